"""A run in numbers, which come from the system, whichever it is."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vislora.compose import configure
from vislora.config.training import Precision
from vislora.report.summary import peak_memory, write_summary

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone tells it there")
def test_peak_memory_is_the_kernels_high_water_mark():
    kept = torch.ones(2**25)  # 128 MB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, of = peak_memory(CPU)
    assert peak >= kept.nbytes
    assert peak == pytest.approx(int(status["VmHWM"].split()[0]) * 1024, rel=0.02)
    assert of == "the whole process"


def test_peak_memory_is_told_where_python_has_no_module_for_it_as_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3_000_000))
    assert peak_memory(CPU) == (3_000_000, "the whole process")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["recipe=vit_birds"], "lora"),
        (["recipe=vit_birds", "adapter=lora", "adapter.dora=true"], "dora"),
        (["recipe=vit_birds", "adapter=pissa"], "pissa"),
        (["recipe=vit_birds", "adapter=probe"], "probe"),
        (["recipe=vit_birds", "adapter=full"], "full"),
        (["recipe=sketch_style"], "lora"),
    ],
)
def test_a_summary_tells_what_was_trained_in_the_words_of_the_option(words, kind, tmp_path):
    write_summary(tmp_path, configure("train", words), 1, 2, 0.5, 1.5, Precision.fp32, CPU)
    assert json.loads((tmp_path / "summary.json").read_text())["adapter"] == kind
