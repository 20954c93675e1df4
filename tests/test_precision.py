"""Precision follows the device."""

import subprocess
import warnings

import pytest
import torch
import torch.nn.functional as F

from vislora.config import Precision
from vislora.errors import ConfigError
from vislora.precision import (
    Float32Attention,
    autocast_dtype,
    cpu_has_bf16,
    new_accelerator,
    resolve_precision,
    training_attention,
)

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


def attention(q, k, v, mask=None, **rest):
    """The result, and the gradients of q, k and v of the sum of its squares."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*leaves, attn_mask=mask, **rest)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_in_float32_is_nearer_to_float64_than_bf16_and_of_its_type(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (40, 30, 30))
    mask = torch.randn(40, 30) if masked else None
    exact = attention(q.double(), k.double(), v.double(), mask.double() if masked else None, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = attention(q, k, v, mask, scale=0.3)
        with Float32Attention():
            in_float32 = attention(q, k, v, mask, scale=0.3)
    for one, other, reference in zip(in_bf16, in_float32, exact, strict=True):
        assert one.dtype is other.dtype
        assert (other - reference).norm() < 0.8 * (one - reference).norm()


@pytest.mark.parametrize(("queries", "autocast"), [(1024, True), (8, False)])
def test_other_attention_is_left_as_it_is(queries, autocast):
    q, k, v = (torch.randn(1, 1, n, 8) for n in (queries, 5, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = attention(q, k, v)
        with Float32Attention():
            found = attention(q, k, v)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert expected[0].dtype is (torch.bfloat16 if autocast else torch.float32)


def test_a_cpu_trains_with_it_in_bf16_alone():
    found = {
        precision: type(training_attention(new_accelerator(precision, cpu=True))) is Float32Attention
        for precision in (Precision.bf16, Precision.fp32)
    }
    assert found == {Precision.bf16: True, Precision.fp32: False}
