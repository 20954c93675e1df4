"""What a device computes well in."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vislora.config import Precision
from vislora.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


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


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's bf16), as the kernel lists its features."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.partition(":")[2].split()))
    return False
