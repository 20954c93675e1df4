"""What a device computes well in."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vislora.config import Precision
from vislora.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_MANY_QUERIES = 1024  # with as many, bf16's backward pass is the faster one


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


def new_accelerator(precision: Precision, **options: Any) -> Accelerator:
    """An Accelerator of this precision; accelerate itself would hold a process to that of its first one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no" if precision is Precision.fp32 else precision.value, **options)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What autocast computes in; None where it is off (fp32)."""
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(precision)


def training_attention(accelerator: Accelerator) -> AbstractContextManager:
    """How attention is computed in training: on a CPU in bf16 by `Float32Attention`, elsewhere as torch does."""
    in_bf16 = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return Float32Attention() if in_bf16 else nullcontext()


class Float32Attention(TorchFunctionMode):
    """Under autocast on a CPU: attention of fewer than 1024 queries in float32, its result in bf16 as ever.

    The backward pass of torch's attention in bf16 goes by blocks so small that on a CPU their overhead exceeds the
    arithmetic, and takes two to four times as long in the models that ship (benchmarks/cpu_attention.py). What
    nn.MultiheadAttention calls can't be seen here, and stays as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _attention if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **rest) -> Tensor:
    inputs = (query, key, value, attn_mask)
    if not torch.is_autocast_enabled("cpu") or query.shape[-2] >= _MANY_QUERIES:
        return F.scaled_dot_product_attention(*inputs, *args, **rest)
    wide = (x.float() if x is not None and x.is_floating_point() else x for x in inputs)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*wide, *args, **rest).bfloat16()


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's bf16), as the kernel lists its features."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.partition(":")[2].split()))
    return False
