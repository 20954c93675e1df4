"""Precision follows the device."""

import subprocess
import warnings

import pytest
import torch

from vislora.config import Precision
from vislora.errors import ConfigError
from vislora.precision import autocast_dtype, cpu_has_bf16, new_accelerator, resolve_precision

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_bf16_only_where_the_kernel_lists_it():
    listed = subprocess.run(["grep", "-qwE", "avx512_bf16|amx_bf16|bf16", "/proc/cpuinfo"], check=False).returncode
    assert cpu_has_bf16() == (listed == 0)
    assert resolve_precision(Precision.auto, CPU) is (Precision.bf16 if listed == 0 else Precision.fp32)


def test_what_is_asked_for_is_taken_or_refused():
    assert resolve_precision(Precision.fp32, CPU) is Precision.fp32
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision(Precision.fp16, CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resolve_precision(Precision.bf16, CPU) is Precision.bf16
    assert bool(caught) is not cpu_has_bf16()


def test_a_run_is_not_held_to_the_precision_of_the_one_before_it_in_the_process():
    for precision, name in ((Precision.bf16, "bf16"), (Precision.fp32, "no")):
        assert new_accelerator(precision, cpu=True).mixed_precision == name


def test_autocast_computes_in_the_chosen_type():
    assert autocast_dtype(Precision.fp32) is None
    with torch.autocast("cpu", autocast_dtype(Precision.bf16)):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype is torch.bfloat16
