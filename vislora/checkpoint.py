"""Checkpoints: everything a run needs to go on bit for bit, as safetensors and JSON.

A checkpoint is a folder that appears whole: it is written under another name first. Parameters are stored by name, the
optimizer's state by parameter name, the random generators of each process by rank.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vislora.ema import Ema
from vislora.errors import ConfigError, first_three
from vislora.files import SETTINGS, write_json, write_tensors

_ENDS = 1024  # numbers of each end of a weight that `frozen_key` looks at


_NO_STEP = (  # settings that change what is drawn on the way, or how much memory it takes, and no step
    *(f"objective.{name}" for name in ("prompts", "preview_steps", "guidance", "before_after")),
    "model.gradient_checkpointing",
)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        best: the best validation figure so far, and the step it was reached at.
        stale: validations since then.
        seconds: that the training loop took, validation included; without what a resumed run did once more.
        rows: of metrics.jsonl by then; None in a checkpoint of an older version.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    rows: int | None = None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require a gradient, and buffers (running statistics, and of how many
    batches); other integers in buffers are positions, which stay as they are."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    return state | {n: b for n, b in buffers.items() if b.is_floating_point() or n.endswith("num_batches_tracked")}


def frozen_key(models: Iterable[nn.Module]) -> str:
    """A hash that tells base weights apart, in whatever precision they are loaded: of the first and the last 1,024
    numbers of every frozen parameter, in bfloat16. A change of nothing but a matrix's middle isn't seen."""
    digest = hashlib.sha256()
    for model in models:
        for name, p in model.named_parameters():
            if not p.requires_grad:
                ends = torch.cat([p.detach().flatten()[:_ENDS], p.detach().flatten()[-_ENDS:]])
                digest.update(f"{name} {list(p.shape)}".encode())
                digest.update(ends.cpu().bfloat16().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a `trainable_state` back into the model, in place.

    Raises:
        ConfigError: it belongs to another model or adapter.
    """
    mine = trainable_state(model)
    if mine.keys() != state.keys():
        odd = sorted(mine.keys() ^ state.keys())
        raise ConfigError(f"the checkpoint is of another model or adapter: {odd[0]} is only in one of them")
    for name, tensor in state.items():
        if mine[name].shape != tensor.shape:
            raise ConfigError(
                f"the checkpoint is of another model or other data: {name} has shape {list(tensor.shape)} there, and "
                f"{list(mine[name].shape)} here"
            )
        mine[name].copy_(tensor)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ema: Ema | None,
    progress: Progress,
    accelerator: Accelerator,
    run: dict[str, Any],
) -> None:
    """Write folder/step_N and remove older ones; called by all processes.

    Args:
        folder: the run's checkpoints/.
        model: unwrapped.
        optimizer: unwrapped.
        ema: the averages, where there are any.
        progress: as of now.
        accelerator: its gradient scaler is saved too.
        run: settings that a resumed run must share, as JSON values.
    """
    target = folder / f"step_{progress.step:08d}"
    part = folder / f".{target.name}.part"
    if accelerator.is_main_process:
        for unfinished in folder.glob(".step_*.part"):
            shutil.rmtree(unfinished)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write_tensors(_generators(accelerator.device), part / f"generators_{accelerator.process_index}.safetensors")
    if accelerator.is_main_process:
        write_tensors(trainable_state(model), part / "model.safetensors")
        write_tensors(_optimizer_tensors(model, optimizer), part / "optimizer.safetensors")
        if ema is not None:
            write_tensors(ema.averages, part / "ema.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        write_json({"progress": asdict(progress), "scaler": scaler, "run": run}, part / "state.json")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        for old in folder.glob("step_*"):
            if old.name < target.name:
                shutil.rmtree(old)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from.

    Attributes:
        folder: with its tensors.
        run: the settings that a resumed run must share.
        progress: how far the run was.
        scaler: the gradient scaler's state; None without one.
    """

    folder: Path
    run: dict[str, Any]
    progress: Progress
    scaler: dict[str, Any] | None

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """The newest checkpoint of a run folder, or the checkpoint itself.

        Raises:
            ConfigError: there is none, or it can't be read.
        """
        found = [path] if (path / "state.json").is_file() else sorted((path / "checkpoints").glob("step_*"))
        if not found:
            raise ConfigError(
                f"trainer.resume={path}: no checkpoint there; give a run folder or one of its checkpoints"
            )
        file = found[-1] / "state.json"
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            return Checkpoint(found[-1], dict(state["run"]), Progress(**state["progress"]), state["scaler"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} can't be read: {error!r}; the run can't go on from this checkpoint") from None

    @property
    def run_folder(self) -> Path:
        """The folder of the run that made it, absolute: what is above "." isn't in its name."""
        return self.folder.resolve().parent.parent

    def check(self, run: dict[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            ConfigError: one differs.
        """
        noted = {key: value for key, value in run.items() if key in self.run}  # an older version noted down less
        if changed := [line for key, value in noted.items() for line in _changes(key, self.run[key], value)]:
            settings = self.run_folder / SETTINGS
            first = settings.read_text(encoding="utf-8").partition("\n")[0] if settings.is_file() else ""
            began = f"; it began as `{first.removeprefix('# ')}`" if first.startswith("# python") else ""
            raise ConfigError(
                f"can't resume {self.folder}: {first_three(changed)}; only with the same settings, those of "
                f"{settings}, does a run go on as if it had not stopped{began}"
            )


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """What of a setting, or of those below it, has another value."""
    if key in _NO_STEP:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for k in {**old, **new} for line in _changes(f"{key}.{k}", old.get(k), new.get(k))]
    return [f"{key} was {old!r} and is now {new!r}"] if old != new else []


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, ema: Ema | None, accelerator: Accelerator
) -> Progress:
    """Continue from a checkpoint: parameters, optimizer, scaler and this process's random generators.

    Raises:
        ConfigError: a file of it can't be read, or is of another model.
    """
    folder = checkpoint.folder
    load_trainable_state(model, read_tensors(folder / "model.safetensors"))
    _load_optimizer_tensors(model, optimizer, read_tensors(folder / "optimizer.safetensors"))
    if ema is not None:
        ema.load(read_tensors(folder / "ema.safetensors"))
    if accelerator.scaler is not None and checkpoint.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.scaler)
    _set_generators(read_tensors(folder / f"generators_{accelerator.process_index}.safetensors"), accelerator.device)
    return replace(checkpoint.progress)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's file, on the CPU.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} can't be read: {error}; the run can't go on from this checkpoint") from None


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for joined, tensor in tensors.items():
        name, _, key = joined.rpartition("|")
        p = parameters[name]
        optimizer.state[p][key] = tensor.to(p.device)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """States by kind of device: the CPU's, and that of the device trained on."""
    own = {} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state()}
    return {"cpu": torch.get_rng_state(), **own}


def _set_generators(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:  # not where the run began on another kind
        torch.get_device_module(device).set_rng_state(state[device.type])
