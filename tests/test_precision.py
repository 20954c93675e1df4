"""Precision follows the device."""

import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pages import in_its_own_process
from quantised import quantise
from torch import nn
from torch.utils.checkpoint import checkpoint

from vislora.config.training import Precision
from vislora.errors import ConfigError
from vislora.precision import (
    CastOnce,
    autocast_dtype,
    cpu_has_bf16,
    denormals_as_zero,
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


@pytest.fixture
def bf16():
    return new_accelerator(Precision.bf16, cpu=True)


def masks():
    random = torch.Generator().manual_seed(1)
    floats = torch.randn(40, 30, generator=random)
    return {"none": None, "added": floats, "boolean": (floats > -1.0)}


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_short_attention_in_float32_is_nearer_to_float64_than_bf16_and_of_its_type(mask, bf16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (40, 30, 30))
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = attention(q.double(), k.double(), v.double(), wide_mask, scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = attention(q, k, v, mask, scale=0.3)
        with training_attention(bf16):
            in_float32 = attention(q, k, v, mask, scale=0.3)
    for one, other, reference in zip(in_bf16, in_float32, exact, strict=True):
        assert one.dtype is other.dtype
        assert (other - reference).norm() < 0.8 * (one - reference).norm()


def test_attention_is_called_by_position_by_name_and_with_groups(bf16):
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16), training_attention(bf16):
        by_position = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
        by_name = F.scaled_dot_product_attention(query=q, value=v, key=k, is_causal=True, enable_gqa=True)
    assert torch.equal(by_position, expected.bfloat16())
    assert torch.equal(by_name, expected.bfloat16())


@pytest.mark.parametrize(
    ("queries", "autocast", "dtype"),
    [(768, True, torch.float32), (8, False, torch.float32), (8, True, torch.float64)],
)
def test_other_attention_is_left_as_it_is(queries, autocast, dtype, bf16):
    q, k, v = (torch.randn(1, 1, n, 8, dtype=dtype) for n in (queries, 5, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = attention(q, k, v)
        with training_attention(bf16):
            found = attention(q, k, v)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert expected[0].dtype is found[0].dtype


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_computed_again_in_the_same_way(reentrant, bf16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16) for n in (40, 30, 30))

    def block(*inputs):
        return F.scaled_dot_product_attention(*inputs).float()

    def grads(call):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with training_attention(bf16):
            with torch.autocast("cpu", torch.bfloat16):
                y = call(*leaves)
            y.square().sum().backward()
        return [x.grad for x in leaves]

    found = grads(lambda *leaves: checkpoint(block, *leaves, use_reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(found, grads(block), strict=True))


def test_attention_is_torchs_own_in_fp32_and_after_an_error(bf16):
    own = F.scaled_dot_product_attention

    def fails():
        with training_attention(bf16):
            assert F.scaled_dot_product_attention is not own
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert F.scaled_dot_product_attention is own
    with training_attention(new_accelerator(Precision.fp32, cpu=True)):
        assert F.scaled_dot_product_attention is own


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight  # as language models share them
        self.conv, self.grouped, self.norm = nn.Conv2d(1, 2, 1), nn.Conv1d(2, 2, 1), nn.LayerNorm(4)


def test_frozen_weights_of_plain_layers_alone_are_cast_and_come_back():
    model = Words().requires_grad_(False)
    model.inner.bias.requires_grad_()
    own = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    casts = CastOnce(model, torch.bfloat16)

    def cast() -> set[str]:
        return {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16}

    def fails_in(context) -> None:
        with context:
            changed.append(cast())
            raise KeyError

    changed: list[set[str]] = []
    with casts, pytest.raises(KeyError):
        fails_in(casts.undone())
    with pytest.raises(KeyError):
        fails_in(casts)
    assert changed == [set(), {"inner.weight", "conv.weight", "conv.bias"}]
    for name, p in model.named_parameters():
        assert (p, p.data_ptr()) == own[name][:2]
        assert torch.equal(p, own[name][2])


@pytest.mark.parametrize("kind", ["class", "weight", "float64"])
def test_what_autocast_leaves_alone_is_not_cast(kind):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).requires_grad_(False)
    dtype = torch.float64 if kind == "float64" else torch.float32
    model = model.double() if kind == "float64" else quantise(model, kind, lambda name: name == "0")
    x = torch.randn(2, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        with CastOnce(model, torch.bfloat16):
            assert torch.equal(model(x), wanted)


def test_without_autocast_nothing_is_cast():
    model = Words().requires_grad_(False)
    with CastOnce(model, None):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def kept_denormals(numbers: int = 1) -> int:
    return int((torch.full((numbers,), 1e-39) * 1.0).count_nonzero())


def test_denormals_count_as_zero_meanwhile():
    assert kept_denormals() == 1
    with denormals_as_zero():
        assert kept_denormals() == 0
        with denormals_as_zero():
            assert kept_denormals() == 0
        assert kept_denormals() == 0
        assert (torch.full((1,), 1.2e-38) * 1.0).item() > 0.0
    assert kept_denormals() == 1


def test_threads_started_meanwhile_take_denormals_for_zero_as_well():
    script = "from test_precision import *\nwith denormals_as_zero(): print(kept_denormals(4_000_000))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert child.stdout == "0\n", child.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("device", "environment", "kept"),
    [("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "100000"}, False)],
)
def test_freed_memory_is_used_again_meanwhile_and_handed_back_afterwards(device, environment, kept):
    script = f"""import torch
from pages import pages_of_a_block
from vislora.precision import freed_memory_kept
before = pages_of_a_block()
with freed_memory_kept(torch.device("{device}")):
    print(before, pages_of_a_block())
print(pages_of_a_block())
"""
    before, meanwhile, after = (int(word) for word in in_its_own_process(script, **environment).split())
    assert (meanwhile < before / 4) is kept
    assert after > before / 2
