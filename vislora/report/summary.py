"""A run in numbers: what was trained, how long it took, and what it needed."""

import sys
from datetime import datetime
from pathlib import Path

import torch

from vislora import __version__
from vislora.config.adapter import AdapterConfig, LoraAdapter, ProbeAdapter
from vislora.config.training import Precision, TrainConfig
from vislora.files import write_json


def write_summary(
    out: Path,
    config: TrainConfig,
    trainable: int,
    parameters: int,
    train_s: float,
    total_s: float,
    precision: Precision,
    device: torch.device,
) -> None:
    """Write summary.json.

    Args:
        trainable: trained parameters, of `parameters` in all.
        train_s: seconds of the training loop, validation included, before a resumed run stopped too.
        total_s: seconds since the command began its work, and those of the loop before that.
    """
    memory, of = peak_memory(device)
    summary = {
        "vislora": __version__,
        "torch": torch.__version__,
        "finished": f"{datetime.now():%Y-%m-%d %H:%M}",
        "model": config.model.name,
        "adapter": _kind(config.adapter),
        "trainable": trainable,
        "parameters": parameters,
        "train_s": train_s,
        "total_s": total_s,
        "peak_memory_gb": memory / 1e9,
        "memory_of": of,
        "precision": precision.value,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    write_json(summary, out / "summary.json")


def _kind(adapter: AdapterConfig) -> str:
    """What is trained, in the words of `adapter=OPTION`."""
    if isinstance(adapter, LoraAdapter):
        return "dora" if adapter.dora else "pissa" if adapter.pissa else "lora"
    return "probe" if isinstance(adapter, ProbeAdapter) else "full"


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes at the peak, and of what: the GPU's tensors, or the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the GPU"
    try:
        import resource
    except ImportError:  # on Windows
        import psutil

        return psutil.Process().memory_info().peak_wset, "the whole process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the whole process"
