"""python -m vislora.train recipe=NAME [key=value …]

Trains an adapter (or a probe, or the whole model) and leaves in the run folder: config.yaml, data.json, metrics.jsonl,
checkpoints/ and adapter/ (or model/); for recognition evaluation/, for diffusion previews/ and before_after/; how far
each layer moved (updates.json), summary.json, figures/ and report.html, which shows it all.
"""

from __future__ import annotations

import csv
import os
import shlex
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vislora.compose import command
from vislora.config.adapter import FullAdapter, LoraAdapter, PipelineLora, ProbeAdapter
from vislora.config.data import AugmentConfig, CaptionedData, DataConfig
from vislora.config.model import ModelConfig, PipelineConfig
from vislora.config.schemas import options_of
from vislora.config.training import DiffusionObjective, Keep, Precision, PrefixCache, RecognitionObjective, TrainConfig
from vislora.config.values import to_dict
from vislora.errors import ConfigError, SweepError
from vislora.files import SETTINGS, check_there, check_unused, holds_checkpoint, naming
from vislora.names import printable
from vislora.paths import absolute

if TYPE_CHECKING:
    from vislora.metrics.recognition import Evaluation
    from vislora.tasks.task import Task


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        artifact: the adapter's folder (PEFT's layout, or diffusers' for a pipeline), or the model's (timm's layout) for
            a probe and full fine-tuning.
        validation: the best validation figure; None where nothing was validated.
        test: figures on the test split; None where there is none.
        trainable: trained parameters, of `parameters` in all.
    """

    artifact: Path
    validation: float | None
    test: Evaluation | None
    trainable: int
    parameters: int


@dataclass(frozen=True)
class _Kind:
    """The module of an objective's task, which classes of settings it goes with, and where a search of settings has to
    go with its validation figure, in the words of Hydra's sweepers."""

    module: str
    model: type
    data: type
    adapters: tuple[type, ...]
    direction: Literal["maximize", "minimize"]


_KINDS: dict[type, _Kind] = {
    RecognitionObjective: _Kind(
        "vislora.tasks.recognition",
        ModelConfig,
        DataConfig,
        (LoraAdapter, ProbeAdapter, FullAdapter),
        "maximize",
    ),
    DiffusionObjective: _Kind(
        "vislora.tasks.diffusion",
        PipelineConfig,
        CaptionedData,
        (PipelineLora,),
        "minimize",
    ),
}


def train(config: TrainConfig, out: Path, validated: bool = False) -> TrainResult:
    """Run a training from a checked configuration (`vislora.compose.configure("train", [...])`) into the folder `out`.

    Args:
        validated: refuse data that hold nothing to validate on.

    Raises:
        VisloraError: a mistake in the settings, the data, the model or the adapter, or a folder that holds a run
            or an evaluation already.
    """
    kind = kind_of(config)
    _check_rates(config)
    _check_prefix_cache(config)
    check_there(_paths(config).items())

    from vislora.precision import denormals_as_zero, freed_memory_kept, own_device

    with denormals_as_zero(), freed_memory_kept(own_device()):
        return _train(kind, config, out, validated)


def _train(kind: _Kind, config: TrainConfig, out: Path, validated: bool) -> TrainResult:
    import torch
    from accelerate.utils import broadcast_object_list

    from vislora.checkpoint import Checkpoint, frozen_key
    from vislora.data.cache import adapter_key
    from vislora.logs import MetricLog, start_trackers, trackers
    from vislora.precision import new_accelerator, own_device, resolve_precision
    from vislora.report.preflight import headline
    from vislora.report.summary import write_summary
    from vislora.report.write import write_run_report
    from vislora.trainer import Trainer

    started = time.perf_counter()
    _make_paths_absolute(config)
    precision = resolve_precision(config.trainer.precision, own_device())
    out = Path(broadcast_object_list([str(out)])[0])  # each process composed its own time stamp
    resumed = None if config.trainer.resume is None else Checkpoint.open(Path(config.trainer.resume))
    if resumed is None or resumed.run_folder != out.resolve():
        check_unused(out, f", or go on with trainer.resume={out}" if holds_checkpoint(out) else "")
    accelerator = new_accelerator(precision, log_with=trackers(config.logger) or None, project_dir=out)
    if accelerator.device.type == "cuda":  # the report's figure is this run's, and not that of a sweep's largest so far
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    run = _shared_by_resumed_runs(config, accelerator.num_processes, precision)
    if resumed is not None:
        resumed.check(run)  # an error before the data is read, where the settings tell already
    task: Task = import_module(kind.module).prepare(config, precision, accelerator, out)
    run |= {of: digest[:12] for of, digest in task.contents.items()}
    run["base weights"] = frozen_key(task.base)[:12]
    if (start := getattr(config.adapter, "start", None)) is not None:
        run["adapter.start (what it holds)"] = adapter_key(Path(start))[:12]
    if resumed is not None:
        resumed.check(run)
    if task.validation is None and (validated or config.trainer.patience is not None):
        wish = "a search" if validated else f"trainer.patience={config.trainer.patience}"
        raise (SweepError if validated else ConfigError)(
            f"{wish} goes by validations, and there is nothing to validate on; give data.val_fraction, or data with a "
            "val split"
        )
    if accelerator.is_main_process:
        _write_settings(config, task, out)
    start_trackers(accelerator, config, out)
    last_step = config.trainer.epochs * task.order.steps_per_epoch
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in task.model.parameters())
    accelerator.print(
        f"{config.model.name}: {trainable:,} of {parameters:,} parameters trained ({trainable / parameters:.2%}), "
        f"{precision.value} on {accelerator.device}, {last_step:,} steps, {task.about}"
    )
    if start is not None:
        accelerator.print(f"adapter.start={start}: layers, ranks and scales are its own, whatever other settings say")
    if resumed is not None:
        accelerator.print(f"goes on after step {resumed.progress.step:,} of {resumed.run_folder}")
    if isinstance(config.adapter, ProbeAdapter) and config.optim.head_lr is not None:
        optim = config.optim
        accelerator.print(f"a probe learns at optim.head_lr={optim.head_lr:g}; optim.lr={optim.lr:g} has no effect")
    if (line := headline(task.preflight)) is not None:
        accelerator.print(f"data: {line}; see {out / 'data.json'}")

    torch.manual_seed(config.seed + accelerator.process_index)  # dropout differs between processes
    trainer = Trainer(
        model=task.model,
        objective=task.objective,
        order=task.order,
        batches=lambda step: task.batches(step, last_step),
        validation=task.validation,
        head=task.head,
        optim=config.optim,
        config=config.trainer,
        accelerator=accelerator,
        log=MetricLog(out, accelerator),
        out=out,
        run=run,
        preview=task.preview,
    )
    with task.training:
        progress = trainer.fit()

    outcome = task.finish()
    if accelerator.is_main_process:
        total_s = time.perf_counter() - started + (0.0 if resumed is None else resumed.progress.seconds)
        write_summary(out, config, trainable, parameters, progress.seconds, total_s, precision, accelerator.device)
        write_run_report(out)
    if progress.best is not None:
        last = config.trainer.keep is Keep.last and progress.step != progress.best_step
        exported = f"; trainer.keep=last exports step {progress.step}" if last else ""
        accelerator.print(f"best {task.objective.monitor} {progress.best:.4g} at step {progress.best_step}{exported}")
    accelerator.print(f"{outcome.artifact.name}: {outcome.artifact}")
    for tracker in accelerator.trackers:
        tracker.finish()  # not end_training: the next run of a search needs the group of processes
    return TrainResult(outcome.artifact, progress.best, outcome.test, trainable, parameters)


def kind_of(config: TrainConfig) -> _Kind:
    """What goes with its objective.

    Raises:
        ConfigError: a chosen model, data or adapter doesn't.
    """
    kind = _KINDS[type(config.objective)]
    objective = type(config.objective).__name__.removesuffix("Objective").lower()
    for name, fits in (
        ("model", lambda chosen: issubclass(chosen, kind.model)),
        ("data", lambda chosen: issubclass(chosen, kind.data)),
        ("adapter", lambda chosen: chosen in kind.adapters),
    ):
        if not fits(type(getattr(config, name))):
            raise ConfigError(
                f"objective={objective} can't be combined with the chosen {name}; {name} can be: "
                + ", ".join(options_of(name, fits))
            )
    return kind


def _check_rates(config: TrainConfig) -> None:
    """Refuse rates of what isn't trained, and 0 for a new head."""
    optim = config.optim
    if optim.head_lr is not None and isinstance(config.model, PipelineConfig):
        raise ConfigError(f"optim.head_lr={optim.head_lr:g}: pipelines have no head; leave it out, or give optim.lr")
    if optim.head_lr == 0.0 and getattr(config.adapter, "start", None) is None:
        raise ConfigError(
            "optim.head_lr=0: the head would stay as it was drawn, and many models draw zeros, through which nothing "
            "is learned; give more, or leave it out for optim.lr"
        )
    if optim.b_lr_ratio != 1.0 and not isinstance(config.adapter, LoraAdapter):
        raise ConfigError(f"optim.b_lr_ratio={optim.b_lr_ratio:g}: the chosen adapter has no lora_B; leave it out")


def _check_prefix_cache(config: TrainConfig) -> None:
    """Refuse a cache of features where pictures don't come in finitely many forms."""
    if config.trainer.prefix_cache is PrefixCache.off:
        return
    if isinstance(config.model, PipelineConfig):
        raise ConfigError("trainer.prefix_cache is for timm models; pipelines cache their latents (data.cache)")
    augment = config.data.augment
    harmless = AugmentConfig(hflip=augment.hflip)
    if odd := {k: v for k, v in vars(harmless).items() if getattr(augment, k) != v}:
        raise ConfigError(
            "trainer.prefix_cache needs pictures that come again; set "
            + ", ".join(f"data.augment.{name}={value:g}" for name, value in odd.items())
            + " (hflip may stay), or trainer.prefix_cache=off"
        )


def _paths(config: TrainConfig) -> dict[str, str | None]:
    """The files and folders that are given, by their settings."""
    data, weights = config.data, getattr(config.model, "weights", "random")
    return {
        "data.root": None if hasattr(data, "download") else getattr(data, "root", None),
        "data.quarantine": getattr(data, "quarantine", None),
        "adapter.start": getattr(config.adapter, "start", None),
        "model.weights": None if weights in ("pretrained", "random") else weights,
        "trainer.resume": config.trainer.resume,
    }


def _make_paths_absolute(config: TrainConfig) -> None:
    """So that the adapter's base weights and data are found from any folder."""
    model, data = config.model, config.data
    if getattr(model, "weights", "random") not in ("pretrained", "random"):
        model.weights = absolute(model.weights)
    if model.name.startswith("local-dir:"):
        model.name = f"local-dir:{absolute(model.name.removeprefix('local-dir:'))}"
    if isinstance(model, PipelineConfig) and model.name != "embedded" and Path(model.name).is_dir():
        model.name = absolute(model.name)
    for group, name in ((data, "root"), (data, "quarantine"), (config.adapter, "start"), (config.trainer, "resume")):
        if getattr(group, name, None) is not None:
            setattr(group, name, absolute(getattr(group, name)))
    if isinstance(data, CaptionedData) and data.prior.images is not None:
        data.prior.images = absolute(data.prior.images)


def _write_settings(config: TrainConfig, task: Task, out: Path) -> None:
    """The run's settings, below what was asked for on a command line, and what was found out about its data."""
    from vislora.files import write_json, write_text

    out.mkdir(parents=True, exist_ok=True)
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    if HydraConfig.initialized():
        words = shlex.join(HydraConfig.get().overrides.task)
        settings = f"# python -m vislora.train {printable(words)}\n{settings}"
    write_text(settings, out / SETTINGS)
    write_json(task.preflight.to_dict(), out / "data.json")


def _shared_by_resumed_runs(config: TrainConfig, processes: int, precision: Precision) -> dict[str, Any]:
    """The settings without which a resumed run would take another path than one that never stopped."""
    whole = to_dict(config)
    own = ("epochs", "batch_size", "accumulation", "ema", "prefix_cache")
    return {
        **{key: whole[key] for key in ("seed", "model", "data", "adapter", "objective", "optim")},
        **{f"trainer.{key}": whole["trainer"][key] for key in own},
        "precision": precision.value,
        "processes": processes,
    }


def _main(config: TrainConfig, out: Path) -> float | None:
    """Train, and tell a sweeper that goes by results, as Optuna's does, the best validation figure."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return train(config, out).validation
    searches, words = _goes_by_results(config, hydra), " ".join(hydra.overrides.task)
    if is_first := os.environ.get("RANK", "0") == "0":
        print(printable(f"run {hydra.job.num}: {words}"))
    result = train(config, out, validated=searches)
    if is_first:
        test = None if result.test is None else result.test.top1
        table = Path(hydra.sweep.dir) / "results.csv"
        _note_result(table, [hydra.job.num, result.validation, test, words])
        print(f"the runs so far: {table}")
    return result.validation


def _goes_by_results(config: TrainConfig, hydra: DictConfig) -> bool:
    """Whether the sweeper searches for the best settings.

    Raises:
        SweepError: it would search for the worst, or every process for its own.
    """
    if hydra.sweeper._target_.endswith(".BasicSweeper"):
        return False
    wanted, given = kind_of(config).direction, hydra.sweeper.get("direction")
    given = getattr(given, "name", given)  # Optuna's default is a member of its own enumeration
    if given != wanted:
        raise SweepError(
            f"hydra.sweeper.direction={given}: to find the best settings and not the worst, it has to be {wanted}; of "
            "sweepers that go by results, Optuna's alone is known"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and hydra.sweeper.get("sampler", {}).get("seed") is None:
        raise SweepError(
            "every process would try settings of its own; give hydra.sweeper.sampler.seed=0, or search with one process"
        )
    return True


def _note_result(file: Path, row: list[Any]) -> None:
    """Add a run of a sweep to the table of all."""
    first = [] if file.is_file() else [["run", "validation", "test_top1", "settings"]]
    with naming(file), file.open("a", newline="", encoding="utf-8", errors="backslashreplace") as table:
        csv.writer(table).writerows([*first, row])


if __name__ == "__main__":
    command("train", _main)
