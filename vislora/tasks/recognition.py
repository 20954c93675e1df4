"""Recognition: a timm model and labelled pictures."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vislora import __version__
from vislora.config.adapter import AdapterConfig, FullAdapter, LoraAdapter, ProbeAdapter
from vislora.config.data import data_to_dict
from vislora.config.training import Precision, PrefixCache, TrainConfig
from vislora.data.cache import content_key, pictures_key
from vislora.data.features import Features, compute_features
from vislora.data.labels import class_name
from vislora.data.load import load_splits
from vislora.data.order import Order, eval_loader, train_loader
from vislora.data.preflight import look_through, rows_of
from vislora.data.splits import Splits
from vislora.data.transforms import Preprocessing, eval_transform, train_transform
from vislora.errors import AdapterError
from vislora.formats.detect import read_adapter
from vislora.formats.peft import write_peft
from vislora.inference import Inference
from vislora.lora import Adapter, Adapters
from vislora.lora.adapter_modules import chosen_biases
from vislora.lora.names import inside
from vislora.metrics.updates import layer_updates, weight_updates
from vislora.models.adapted import lora_settings
from vislora.models.batchnorm import check_passes
from vislora.models.patches import ShownPatches
from vislora.models.prefix import Prefix
from vislora.models.smallest import blank_picture, check_own_size, prove_alive_cheaply
from vislora.models.vit import build_vit, check_held, head_names, preprocessing, save_vit, untrained_names
from vislora.objectives.recognition import Recognition
from vislora.precision import attends_in_float32, autocast_dtype
from vislora.recognizer import Recognizer, base_hash, build_base
from vislora.report.updates import write_updates
from vislora.targets.timm import find_targets
from vislora.targets.trained import find_trained
from vislora.tasks.task import FILES, PICTURES, Outcome, Task
from vislora.trainings import learned_held_out, trainings


def prepare(config: TrainConfig, precision: Precision, accelerator: Accelerator, out: Path) -> Task:
    """Build the adapted model and its data.

    Raises:
        VisloraError: a mistake in the settings, the data, the model or the adapter.
    """
    settings, rank, world = config.trainer, accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():  # so that one process prepares the caches
        splits = load_splits(config.data, config.seed)
    torch.manual_seed(config.seed)
    model = build_vit(config.model, len(splits.classes))
    base_sha256 = base_hash(config.model, model)
    start = _start(config.adapter, model, base_sha256, splits.classes, accelerator)
    before = [] if start is None else trainings(start.about)
    if splits.held_out and any(learned_held_out(one, config.data, splits.held_out_key) for one in before):
        accelerator.print(
            f"adapter.start={config.adapter.start} learned pictures of these data that are held out now, so that "
            "validations don't tell how it does on new ones; give data.val_fraction and seed of its training"
        )
        splits = replace(splits, held_out=False)  # of what this adapter has learned
    new = untrained_names(model)
    adapters = adapt(model, config.adapter, start)
    images = preprocessing(model, config.data.crop_pct)
    augment, plain = train_transform(images, config.data.augment), eval_transform(images)
    order = Order(len(splits.train), settings.batch_size, config.seed, settings.accumulation, rank, world)
    check_own_size(model)
    check_passes(model, order, blank_picture(model))
    patches = ShownPatches(model, dropped) if (dropped := config.data.augment.patch_drop) else None
    validation, entered = None, nullcontext()
    if settings.prefix_cache is PrefixCache.off:
        shown = None if patches is None else (patches.kept, patches.total)
        batches = partial(train_loader, splits.train, augment, order, workers=settings.workers, patches=shown)
        if splits.val is not None:
            validation = eval_loader(splits.val, plain, settings.batch_size, settings.workers, rank, world)
    else:
        train_features, val_features, entered = _from_features(config, model, images, splits, precision, accelerator)
        batches = partial(train_features.training, order, hflip=config.data.augment.hflip)
        if val_features is not None:
            validation = val_features.evaluation(settings.batch_size, rank, world)

    learned = [split for split in (splits.train, splits.val) if split is not None]

    def finish() -> Outcome:
        about = _about(config, base_sha256, images, splits)
        if start is not None:
            about["trainings"] = trainings(about, start.about)
        artifact = out / ("model" if adapters is None else "adapter")
        if accelerator.is_main_process:
            _export(model, adapters, config, about, artifact)
        if splits.test is None:
            return Outcome(artifact)
        # here, as torchmetrics and scipy take seconds to import, which the first step needn't wait for
        from vislora.report.evaluation import write_evaluation
        from vislora.scoring import evaluate_split

        recognizer = Recognizer(model.eval(), images, splits.classes, about)
        inference = Inference(settings.batch_size, precision, settings.workers, accelerator)
        test = evaluate_split(recognizer, splits.test, inference)
        if accelerator.is_main_process:
            write_evaluation(test, out / "evaluation")
        accelerator.print(test.table())
        return Outcome(artifact, test)

    return Task(
        model=model,
        base=[model],
        objective=Recognition(config.objective.label_smoothing, patches),
        order=order,
        batches=batches,
        validation=validation,
        about=f"{len(splits.train)} images, {len(splits.classes)} classes{_unmeasured(splits)}",
        contents={
            FILES: content_key(*(repr((s.classes, [*s.names], [*s.labels])) for s in learned)),
            PICTURES: pictures_key((name for s in learned for name in s.names), splits.facts, splits.elsewhere),
        },
        preflight=look_through(rows_of(splits), splits.problems, images.size),
        finish=finish,
        head=tuple(f"{name}." for name in new),
        training=entered,
    )


def _unmeasured(splits: Splits) -> str:
    """A hint where no figure will tell what was learned."""
    if splits.val is not None or splits.test is not None:
        return ""
    single = len(splits.train) <= len(splits.classes)
    remedy = "each class has a single picture" if single else "data.val_fraction=0.2 would hold some out"
    return f"; nothing to measure on ({remedy})"


def adapt(model: nn.Module, config: AdapterConfig, start: Adapter | None = None) -> Adapters | None:
    """Freeze and adapt a timm model as configured, its head, and what else starts at random, always trained in full;
    prove that every adapter acts.

    Args:
        start: the adapter to go on from, in place of a new one.

    Returns:
        the adapters, holding one named "default"; None for a probe or full fine-tuning.

    Raises:
        AdapterError: targets, or modules to train in full, that aren't there (or not in the adapter to go on from), or
            that can't move the logits; single parameters that start at random.
    """
    new = untrained_names(model)
    if isinstance(config, LoraAdapter):
        check_held(model)
        adapters = Adapters(model)
        besides = find_trained(model, config.trained, new)
        new = [name for name in new if not any(inside(name, whole) for whole in besides)]
        if start is None:
            trained = [*new, *besides]
            targets = find_targets(model, [t.value for t in config.targets], config.blocks, trained)
            adapters.add("default", targets, lora_settings(config), trained)
        else:
            _check_trained(model, config, start, new, besides)
            adapters.load("default", start)
        prove_alive_cheaply(model)
        return adapters
    model.requires_grad_(not isinstance(config, ProbeAdapter))
    for name, parameter in model.named_parameters():
        if any(inside(name, one) for one in new):
            parameter.requires_grad_(True)
    return None


def _check_trained(model: nn.Module, config: LoraAdapter, start: Adapter, new: list[str], besides: list[str]) -> None:
    """Refuse to go on from an adapter without what is to be trained beside its layers: it would stay frozen."""
    lacking = [
        f"{name} ({why})"
        for names, why in ((new, "which starts at random"), (besides, "adapter.trained"))
        for name in names
        if not any(inside(name, whole) for whole in start.trained)
    ]
    biases = chosen_biases(model, config.bias.value, start.layers, start.trained)
    lacking += [f"{name} (adapter.bias={config.bias.value})" for name in biases if name not in start.biases]
    if lacking:
        raise AdapterError(
            f"adapter.start={config.start} holds no {lacking[0]}, and what is trained with it is what it holds; leave "
            "that out, or train a new adapter"
        )


def _start(
    config: AdapterConfig, model: nn.Module, sha256: str | None, classes: tuple[str, ...], accelerator: Accelerator
) -> Adapter | None:
    """The adapter to go on from, with its head where its classes are these, in whatever order, and with a new one for
    others."""
    if not isinstance(config, LoraAdapter) or config.start is None:
        return None
    start = read_adapter(config.start)
    expected = start.about.get("weights_sha256")
    if expected not in (None, sha256):
        raise AdapterError(
            f"adapter.start={config.start} was trained on base weights with SHA-256 {expected[:12]}…, these have "
            f"{(sha256 or 'none')[:12]}…; go on from the same base"
        )
    heads = {name: model.get_submodule(name) for name in head_names(model)}
    theirs, mine = ([class_name(str(name)) for name in names] for names in (start.about.get("classes", ()), classes))
    trained = {**start.trained, **{name: head.state_dict() for name, head in heads.items()}}
    if sorted(theirs) == sorted(mine):
        rows = torch.tensor([theirs.index(name) for name in mine])
        for name in heads.keys() & start.trained.keys():
            trained[name] = _reordered(start.trained[name], heads[name], rows)
    else:
        told = "has other" if theirs else "tells no"
        accelerator.print(f"adapter.start={config.start} {told} classes; the head begins anew")
    return replace(start, trained=trained, dropout=config.dropout)


def _reordered(state: Mapping[str, Tensor], head: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """A classifier's state with the outputs of its last layer in another order."""
    last = [name for name, module in head.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1:]
    own = {f"{name}.{key}".lstrip(".") for name in last for key in ("weight", "bias")}
    return {key: value[rows] if key in own else value for key, value in state.items()}


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
    where, size = config.trainer.prefix_cache, (3, images.size, images.size)
    model.to(accelerator.device)
    example = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    dtype = autocast_dtype(precision)
    with torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
        prefix = Prefix(model, example)
    key = prefix.key(f"{asdict(config.model)} {precision.value} {attends_in_float32(accelerator)}")
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


def _about(config: TrainConfig, base_sha256: str | None, images: Preprocessing, splits: Splits) -> dict[str, Any]:
    """What travels with the trained parameters, for whoever opens them."""
    return {
        "vislora": __version__,
        "model": asdict(config.model),
        "weights_sha256": base_sha256,
        "preprocessing": images.to_dict(),
        "classes": list(splits.classes),
        "data": data_to_dict(config.data),
        "seed": config.seed,  # which decides what was held out, and random weights
        "held_out_key": splits.held_out_key,
    }


def _export(
    model: nn.Module, adapters: Adapters | None, config: TrainConfig, about: dict[str, Any], artifact: Path
) -> None:
    if adapters is not None:
        adapter = adapters.adapter("default")
        write_peft(replace(adapter, about=about), artifact)
        write_updates(layer_updates(adapter, model), artifact.parent)
        return
    save_vit(model, artifact, about)
    if isinstance(config.adapter, FullAdapter):
        base, _ = build_base(about, artifact)
        write_updates(weight_updates(model, base, untrained_names(base)), artifact.parent)
