"""A run's figures come from the system, whichever it is."""

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vislora.report.summary import peak_memory

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
