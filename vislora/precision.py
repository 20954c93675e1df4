"""What a device computes well in."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.config.training import Precision
from vislora.errors import ConfigError
from vislora.lora.reads import is_plain

if TYPE_CHECKING:
    from accelerate import Accelerator

# of a process for the first one, which draws, encodes or looks into what all need; torch would let it give up after
# 10 minutes on GPUs, and after 30 on CPUs
_LONGEST_WAIT = timedelta(days=1)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_MANY_QUERIES = 768  # of 577 attention is faster in float32, of 1024 in bf16


def resolve_precision(wanted: Precision, device: torch.device) -> Precision:
    """The precision to run in: `auto` becomes bf16 or fp16 as a GPU has it, on a CPU bf16 only where it is native.

    Without native support a CPU's bf16 product is emulated and up to a hundred times slower than fp32.

    Raises:
        ConfigError: fp16 asked for on a CPU, where gradients would underflow and nothing would be gained.
    """
    if wanted is Precision.auto:
        if device.type == "cuda":
            return Precision.bf16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.fp16
        return Precision.bf16 if device.type == "cpu" and cpu_has_bf16() else Precision.fp32
    if wanted is Precision.fp16 and device.type != "cuda":
        raise ConfigError(f"precision=fp16 needs a GPU, this run is on {device.type}; use auto, fp32 or bf16")
    if wanted is Precision.bf16 and device.type == "cpu" and not cpu_has_bf16():
        warnings.warn(
            "this CPU has no native bf16: expect steps up to 100 times slower than precision=fp32", stacklevel=2
        )
    return wanted


def own_device() -> torch.device:
    """The device of this process, as accelerate chooses it: the CPU where ACCELERATE_USE_CPU is set."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_LONGEST_WAIT).device


def new_accelerator(precision: Precision, **options: Any) -> Accelerator:
    """An Accelerator of this precision; accelerate itself would hold a process to that of its first one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if precision is Precision.fp32 else precision.value,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        **options,
    )


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What autocast computes in; None where it is off (fp32)."""
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(precision)


def attends_in_float32(accelerator: Accelerator) -> bool:
    """Whether short attention is computed in float32 in training: on a CPU that trains in bf16."""
    return accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"


@contextmanager
def training_attention(accelerator: Accelerator) -> Iterator[None]:
    """Meanwhile, where `attends_in_float32`: attention of fewer than 768 queries under autocast is computed in
    float32, its result in autocast's type as before.

    The backward pass of torch's attention in bf16 works in blocks so small that on a CPU their overhead exceeds the
    arithmetic; benchmarks/cpu_attention.py has the times. `F.scaled_dot_product_attention` itself is replaced: a
    TorchFunctionMode isn't active in backward, where checkpointed blocks are computed again.
    """
    if not attends_in_float32(accelerator):
        yield
        return
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **rest) -> Tensor:
        inputs = (query, key, value, attn_mask)
        lowered = torch.is_autocast_enabled("cpu") and query.dtype is not torch.float64  # which autocast leaves alone
        if not lowered or query.shape[-2] >= _MANY_QUERIES:
            return plain(*inputs, *args, **rest)
        wide = (x.float() if x is not None and x.is_floating_point() else x for x in inputs)
        with torch.autocast("cpu", enabled=False):
            y = plain(*wide, *args, **rest)
        return y.to(torch.get_autocast_dtype("cpu"))

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class CastOnce:
    """Entered, the frozen weights of a model's linear layers and convolutions are in autocast's type, to which it would
    cast them in every pass; benchmarks/latent_cache.py has what that takes of a step. Under autocast the model computes
    the same bit for bit; without, it only can while this is `undone`.

    Adapted layers keep their weights, as 16 bits hold no sum with a small update, and so do layers that share theirs,
    and quantised ones.

    Args:
        model: with its adapters.
        dtype: autocast's; None where it is off, and nothing is cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        cast: dict[int, nn.Parameter] = {}
        kept: set[int] = set()
        for module in model.modules():
            own = {id(p): p for p in module.parameters(recurse=False)}
            if type(module) in (nn.Linear, nn.Conv2d):  # no others: what they do with their weights is their own
                cast |= {key: p for key, p in own.items() if not p.requires_grad and _is_cast(p)}
            else:
                kept |= own.keys()
        self._away = [(p, p.data.to(dtype)) for key, p in cast.items() if key not in kept] if dtype is not None else []

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Meanwhile the weights are what they were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, (parameter, other) in enumerate(self._away):
            self._away[i] = (parameter, parameter.data)
            parameter.data = other


def _is_cast(parameter: nn.Parameter) -> bool:
    """Whether autocast casts it: not float64, nor codes for numbers."""
    return is_plain(parameter) and parameter.dtype is not torch.float64


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Meanwhile a CPU takes numbers too small for a full mantissa (below 1.2e-38 in float32) for zero, as its bf16
    products do anyway, in this thread and in those that it starts.

    It computes with them a hundred times more slowly, and a trained transformer may have many: where attention is all
    on one token, the gradients of the others are as small. benchmarks/cpu_process.py has the times. Torch starts its
    threads with the first operation that it divides: enter before it, or those threads stay as they are, which costs
    time and may change last bits.
    """
    before = torch.full((), 2.0**-140).mul(1.0).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Meanwhile, where a CPU computes under glibc, this process keeps what it frees for what it asks for next.

    By itself glibc hands blocks of megabytes back, and every step gets them anew, where the kernel empties them page by
    page as they are first written to; benchmarks/cpu_process.py has the times. Settings of the user's own are left as
    they are (MALLOC_…_, GLIBC_TUNABLES).
    """
    own = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or own or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # where glibc's own thresholds end, which rise with what is freed
        libc.mallopt(_M_TRIM_THRESHOLD, 2**26)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.malloc_trim(0)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's bf16), as the kernel lists its features."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.partition(":")[2].split()))
    return False
