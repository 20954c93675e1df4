"""python -m vislora.train recipe=NAME [key=value …]

Trains an adapter (or a probe, or the whole model), evaluates it on the test split and leaves in the run folder:
config.yaml, data.json, metrics.jsonl, checkpoints/, adapter/ (or model/), evaluation/.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from vislora import __version__
from vislora.compose import command
from vislora.config import AdapterConfig, LoraAdapter, Precision, PrefixCache, ProbeAdapter, TrainConfig, data_to_dict

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from vislora.data.features import Features
    from vislora.data.splits import Splits
    from vislora.data.transforms import Preprocessing
    from vislora.lora import Adapters
    from vislora.metrics.recognition import Evaluation


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        artifact: the adapter's folder (PEFT's layout), or the model's (timm's layout) for a probe and full fine-tuning.
        validation: the best validation figure; None where nothing was validated.
        test: figures on the test split; None where there is none.
        trainable: trained parameters, of `parameters` in all.
    """

    artifact: Path
    validation: float | None
    test: Evaluation | None
    trainable: int
    parameters: int


def train(config: TrainConfig, out: Path) -> TrainResult:
    """Run a training from a checked configuration (`vislora.compose.configure("train", [...])`) into the folder `out`.

    Raises:
        VisloraError: a mistake in the settings, the data, the model or the adapter.
    """
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import broadcast_object_list

    from vislora.data.features import check_deterministic
    from vislora.data.load import load_splits
    from vislora.data.order import Order, eval_loader, train_loader
    from vislora.data.transforms import eval_transform, train_transform
    from vislora.evaluate import evaluate_split
    from vislora.logs import MetricLog, trackers
    from vislora.models.vit import build_vit, head_names, preprocessing
    from vislora.objectives.recognition import Recognition
    from vislora.precision import resolve_precision
    from vislora.recognizer import Recognizer
    from vislora.trainer import Trainer

    _make_paths_absolute(config)
    settings = config.trainer
    if settings.prefix_cache is not PrefixCache.off:
        check_deterministic(config.data.augment)
    precision = resolve_precision(settings.precision, PartialState().device)
    out = Path(broadcast_object_list([str(out)])[0])  # each process composed its own time stamp
    accelerator = Accelerator(
        mixed_precision="no" if precision is Precision.fp32 else precision.value,
        log_with=trackers(config.logger) or None,
        project_dir=out,
    )
    rank, world = accelerator.process_index, accelerator.num_processes

    with accelerator.main_process_first():  # so that one process prepares the caches
        splits = load_splits(config.data, config.seed)
    torch.manual_seed(config.seed)
    model = build_vit(config.model, len(splits.classes))
    adapters = adapt(model, config.adapter)
    images = preprocessing(model, config.data.crop_pct)
    if accelerator.is_main_process:
        _write_settings(config, splits, out)
    accelerator.init_trackers(config.logger.project)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{config.model.name}: {trainable:,} of {parameters:,} parameters trained ({trainable / parameters:.2%}), "
        f"{precision.value} on {accelerator.device}, {len(splits.train)} images, {len(splits.classes)} classes"
    )
    if splits.problems:
        accelerator.print(f"{len(splits.problems)} files need a look: {out / 'data.json'}")

    augment, plain = train_transform(images, config.data.augment), eval_transform(images)
    order = Order(len(splits.train), settings.batch_size, config.seed, settings.accumulation, rank, world)
    last_step = settings.epochs * order.steps_per_epoch
    validation, entered = None, nullcontext()
    if settings.prefix_cache is PrefixCache.off:
        batches = partial(train_loader, splits.train, augment, order, stop=last_step, workers=settings.workers)
        if splits.val is not None:
            validation = eval_loader(splits.val, plain, settings.batch_size, settings.workers, rank, world)
    else:
        train_features, val_features, entered = _from_features(config, model, images, splits, precision, accelerator)
        batches = partial(train_features.training, order, stop=last_step, hflip=config.data.augment.hflip)
        if val_features is not None:
            validation = val_features.evaluation(settings.batch_size, rank, world)
    torch.manual_seed(config.seed + rank)  # dropout differs between processes
    trainer = Trainer(
        model=model,
        objective=Recognition(config.objective.label_smoothing),
        order=order,
        batches=batches,
        validation=validation,
        head=tuple(f"{name}." for name in head_names(model)),
        optim=config.optim,
        config=settings,
        accelerator=accelerator,
        log=MetricLog(out, accelerator),
        out=out,
        run=_shared_by_resumed_runs(config, world, precision),
    )
    with entered:
        progress = trainer.fit()

    about = _about(config, images, splits.classes)
    artifact = out / ("model" if adapters is None else "adapter")
    if accelerator.is_main_process:
        _export(model, adapters, about, artifact)
    test = None
    if splits.test is not None:
        recognizer = Recognizer(model.eval(), images, splits.classes, about)
        test = evaluate_split(recognizer, splits.test, settings.batch_size, precision, settings.workers, accelerator)
        if accelerator.is_main_process:
            test.write(out / "evaluation")
        accelerator.print(test.table())
    if progress.best is not None:
        accelerator.print(f"best validation top-1 {progress.best:.1%} at step {progress.best_step}")
    accelerator.print(f"{artifact.name}: {artifact}")
    accelerator.end_training()
    return TrainResult(artifact, progress.best, test, trainable, parameters)


def adapt(model: nn.Module, config: AdapterConfig) -> Adapters | None:
    """Freeze and adapt a timm model as configured, its head always trained in full; prove that every adapter acts.

    Returns:
        the adapters, holding one named "default"; None for a probe or full fine-tuning.
    """
    from vislora.lora import Adapters, LoraSettings
    from vislora.models.smallest import prove_alive_cheaply
    from vislora.models.vit import head_names
    from vislora.targets.timm import find_targets
    from vislora.targets.trained import find_trained

    head = head_names(model)
    if isinstance(config, LoraAdapter):
        trained = [*head, *find_trained(model, config.trained, head)]
        targets = find_targets(model, [t.value for t in config.targets], config.blocks, trained)
        adapters = Adapters(model)
        settings = LoraSettings(
            config.rank,
            config.alpha,
            config.dropout,
            config.rslora,
            config.dora,
            config.pissa,
            config.bias.value,
            config.rank_pattern,
            config.alpha_pattern,
        )
        adapters.add("default", targets, settings, trained)
        prove_alive_cheaply(model)
        return adapters
    model.requires_grad_(not isinstance(config, ProbeAdapter))
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    return None


def _from_features(
    config: TrainConfig,
    model: nn.Module,
    images: Preprocessing,
    splits: Splits,
    precision: Precision,
    accelerator: Accelerator,
) -> tuple[Features, Features | None, AbstractContextManager]:
    """Features of the training and validation pictures up to the first trained block, and the context in which the
    model takes them in place of pictures."""
    import torch

    from vislora.data.features import compute_features
    from vislora.data.transforms import eval_transform
    from vislora.models.prefix import Prefix
    from vislora.precision import autocast_dtype

    where, size = config.trainer.prefix_cache, (3, images.size, images.size)
    model.to(accelerator.device)
    example = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    dtype = autocast_dtype(precision)
    with torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
        prefix = Prefix(model, example)
    key = prefix.key(f"{asdict(config.model)} {precision.value}")
    found = []
    for split, flips in ((splits.train, config.data.augment.hflip > 0), (splits.val, False)):
        compute = partial(compute_features, transform=eval_transform(images), flips=flips, prefix=prefix, key=key)
        rest = {"where": where, "autocast": dtype, "workers": config.trainer.workers, "accelerator": accelerator}
        found.append(None if split is None else compute(split, **rest))
    size_gb = sum(f.rows.numel() * f.rows.element_size() for f in found if f is not None) / 1e9
    accelerator.print(
        f"prefix cache: {prefix.count} of {prefix.total} blocks are computed once, {size_gb:.2f} GB ({where.value})"
    )
    return found[0], found[1], prefix.skipped(size)


def _make_paths_absolute(config: TrainConfig) -> None:
    """So that the adapter's base weights and data are found from any folder."""
    if config.model.weights not in ("pretrained", "random"):
        config.model.weights = str(Path(config.model.weights).expanduser().absolute())
    if getattr(config.data, "root", None) is not None:
        config.data.root = str(Path(config.data.root).expanduser().absolute())


def _write_settings(config: TrainConfig, splits: Splits, out: Path) -> None:
    """The run's settings, and the files of its data that were left out or need a look."""
    from vislora.files import write_json, write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), out / "config.yaml")
    write_json([asdict(problem) | {"file": str(problem.file)} for problem in splits.problems], out / "data.json")


def _about(config: TrainConfig, images: Preprocessing, classes: tuple[str, ...]) -> dict[str, Any]:
    """What travels with the trained parameters, for whoever opens them."""
    from vislora.models.vit import weights_hash

    return {
        "vislora": __version__,
        "model": asdict(config.model),
        "weights_sha256": weights_hash(config.model),
        "preprocessing": images.to_dict(),
        "classes": list(classes),
        "data": data_to_dict(config.data),
    }


def _export(model: nn.Module, adapters: Adapters | None, about: dict[str, Any], artifact: Path) -> None:
    from vislora.formats.peft import write_peft
    from vislora.models.vit import save_vit

    if adapters is None:
        save_vit(model, artifact, about)
    else:
        write_peft(replace(adapters.adapter("default"), about=about), artifact)


def _shared_by_resumed_runs(config: TrainConfig, processes: int, precision: Precision) -> dict[str, Any]:
    """The settings without which a resumed run would take another path than one that never stopped."""
    whole = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    own = ("epochs", "batch_size", "accumulation", "prefix_cache")
    return {
        **{key: whole[key] for key in ("seed", "model", "data", "adapter", "objective", "optim")},
        **{f"trainer.{key}": whole["trainer"][key] for key in own},
        "precision": precision.value,
        "processes": processes,
    }


if __name__ == "__main__":
    command("train", lambda config, out: train(config, out))
