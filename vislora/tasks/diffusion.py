"""Diffusion: a text-to-image pipeline and captioned pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from vislora import __version__
from vislora.config.data import CaptionedData, data_to_dict
from vislora.config.training import Precision, TrainConfig
from vislora.data.buckets import BucketOrder, Size, bucket_sizes, nearest
from vislora.data.cache import content_key, pictures_key
from vislora.data.captions import Captioned
from vislora.data.encoded import Gallery, LatentSet, PixelSet, encode
from vislora.data.images import Facts
from vislora.data.load import load_captions
from vislora.data.order import MicroBatches, Order, SampleKey, batch_loader
from vislora.data.preflight import captioned_rows_of, look_through
from vislora.data.prompts import noise_seed
from vislora.drawing import Sampling, check_steps, draw
from vislora.errors import ConfigError
from vislora.formats.detect import read_adapter
from vislora.formats.diffusers import write_diffusers
from vislora.lora import Adapters
from vislora.metrics.updates import layer_updates
from vislora.models.adapted import adapt_pipeline
from vislora.models.denoiser import cut_off, readers, text_encoders
from vislora.models.diffusion import (
    PipelineEncoder,
    configs_key,
    load_pipeline,
    longest_side,
    resolution,
    scheduler_class,
)
from vislora.models.families import family_of
from vislora.objectives.diffusion import Diffusion
from vislora.objectives.schedules import schedule
from vislora.precision import CastOnce, autocast_dtype
from vislora.report.before_after import write_pairs
from vislora.report.sheets import save_grid
from vislora.report.updates import write_updates
from vislora.tasks.prior import with_prior
from vislora.tasks.task import FILES, PICTURES, Outcome, Task
from vislora.trainings import trainings

_VALIDATION_SEED = 0  # of the validation noise: the same in every run


def prepare(config: TrainConfig, precision: Precision, accelerator: Accelerator, out: Path) -> Task:
    """Build the adapted pipeline, its data, and what of it can be encoded beforehand.

    Raises:
        VisloraError: a mistake in the settings, the data, the model or the adapter.
    """
    settings, data, device = config.trainer, config.data, accelerator.device
    on_gpu = device.type == "cuda"
    # told before gigabytes of weights are loaded
    if config.objective.min_snr_gamma is not None and scheduler_class(config.model).startswith("FlowMatch"):
        raise ConfigError(f"{config.model.name} is trained by flow matching: set objective.min_snr_gamma=null")
    pipe = load_pipeline(config.model, (autocast_dtype(precision) or torch.float32) if on_gpu else torch.float32)
    noises = schedule(pipe.scheduler, device)
    if settings.preview_every is not None or config.objective.before_after:
        check_steps(pipe.scheduler, config.objective.preview_steps, "objective.preview_steps")
    side = _side(pipe, config)
    with accelerator.main_process_first():  # so that one process prepares the caches
        splits = load_captions(data)
        learned, weights, shown = with_prior(pipe, splits, data, device)
    train = Gallery(learned.train, _sizes(learned.train, learned.facts, data, side), weights, shown, data.hflip)
    val = None
    if splits.val is not None:
        whole = range(len(splits.val))
        val = Gallery(splits.val, _sizes(splits.val, splits.facts, data, side), [1.0] * len(whole), whole)

    encoder = PipelineEncoder(pipe, device)
    getattr(pipe, family_of(pipe).component).to(device)  # where the proof that adapters act is quick
    torch.manual_seed(config.seed)
    start = None if config.adapter.start is None else read_adapter(config.adapter.start, type(pipe))
    adapters = adapt_pipeline(pipe, config.adapter, start)
    trains_text = config.adapter.text_encoder
    model = adapters.model
    order = _order(train, config, accelerator)
    with accelerator.main_process_first():
        sets = [_dataset(gallery, encoder, data.cache, trains_text) for gallery in (train, val) if gallery is not None]
    no_text = encoder.tokens([""])
    if not trains_text:
        no_text = encoder.text(no_text)
    no_text = {name: value.to(device) for name, value in no_text.items()}

    def spare() -> None:
        if data.cache:  # nothing is left to encode
            encoder.spare(with_text=not trains_text)

    spare()
    prompts = config.objective.prompts or list(dict.fromkeys(splits.train.captions))[:8]

    sampling = Sampling(config.objective.preview_steps, config.objective.guidance, (side, side))
    # no more pictures at once than training has memory for
    at_once = min(8, max(1, settings.batch_size // settings.accumulation // accelerator.num_processes))
    casts = CastOnce(model, autocast_dtype(precision))

    def preview(file: Path) -> None:
        pipe.to(device)
        with casts.undone():
            rows = [draw(pipe, [(prompt, seed) for prompt in prompts], sampling, at_once) for seed in range(2)]
        save_grid(rows, prompts, file, ["seed 0", "seed 1"])
        spare()

    parts = [part for part in (learned.train, splits.val) if part is not None]

    def finish() -> Outcome:
        if accelerator.is_main_process:
            about = {"vislora": __version__, "model": asdict(config.model), "data": data_to_dict(data)}
            about |= {"caption": splits.train.captions[0]}
            if start is not None:
                about["trainings"] = trainings(about, start.about)
            adapter = adapters.adapter("default")
            write_diffusers(replace(adapter, about=about), out / "adapter")
            write_updates(layer_updates(adapter, model), out)
            if texts := prompts[: config.objective.before_after]:
                write_pairs(texts, *_before_and_after(pipe.to(device), adapters, texts, sampling, at_once), out)
        return Outcome(out / "adapter")

    return Task(
        model=model,
        base=[model, pipe.vae, *(getattr(pipe, name) for name in text_encoders(pipe))],
        objective=Diffusion(
            noises,
            no_text,
            None if data.cache else encoder,
            not trains_text,
            config.objective.min_snr_gamma,
            config.objective.noise_offset,
            config.objective.caption_dropout,
            config.objective.timestep_shift,
        ),
        order=order,
        batches=lambda start, stop: batch_loader(sets[0], MicroBatches(order, start, stop), settings.workers),
        validation=None if val is None else _validation(sets[1], val, settings.batch_size, accelerator),
        about=f"{len(splits.train)} pictures"
        + (f", {classes} of the class" if (classes := len(learned.train) - len(splits.train)) else "")
        + f" of {side} pixels",
        contents={
            FILES: content_key(*(repr(([*s.names], [*s.captions])) for s in parts)),
            PICTURES: pictures_key((name for s in parts for name in s.names), learned.facts),
            "configs of the pipeline": configs_key(pipe),
        },
        preflight=look_through(
            captioned_rows_of(splits), learned.problems, side, cut_off=partial(cut_off, readers(pipe))
        ),
        finish=finish,
        preview=preview,
        training=casts,
    )


def _before_and_after(
    pipe: Any, adapters: Adapters, prompts: Sequence[str], sampling: Sampling, at_once: int
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The prompts drawn without and with the adapter, from the same noise."""
    adapters.model.eval()
    found = []
    for scale in (0.0, 1.0):
        adapters.scale("default", scale)
        found.append(draw(pipe, [(prompt, noise_seed(0, prompt)) for prompt in prompts], sampling, at_once))
    return found[0], found[1]


def _side(pipe: Any, config: TrainConfig) -> int:
    multiple, data = family_of(pipe).multiple, config.data
    side = resolution(config.model) if data.size is None else data.size
    if side < multiple or side % multiple:
        raise ConfigError(f"data.size={side}: expected a multiple of {multiple} pixels")
    longest = max(max(size) for size in bucket_sizes(side)) if data.buckets else side
    if (most := longest_side(pipe)) is not None and longest > most:
        raise ConfigError(f"data.size={side} has sides of {longest} pixels; {type(pipe).__name__} can't go over {most}")
    return side


def _sizes(captioned: Captioned, facts: Mapping[str, Facts], data: CaptionedData, side: int) -> list[Size]:
    """What each picture is cut to; those that lie in files aren't opened for it, as their sizes are known."""
    if not data.buckets:
        return [(side, side)] * len(captioned)
    sizes = bucket_sizes(side)
    known = [facts.get(name) for name in captioned.names]
    own = [captioned.pictures[i].size if fact is None else (fact.width, fact.height) for i, fact in enumerate(known)]
    return [nearest(size, sizes) for size in own]


def _order(gallery: Gallery, config: TrainConfig, accelerator: Accelerator) -> Order:
    shape = (len(gallery), config.trainer.batch_size, config.seed, config.trainer.accumulation)
    place = (accelerator.process_index, accelerator.num_processes)
    if not config.data.buckets:
        return Order(*shape, *place)
    numbers = {size: i for i, size in enumerate(sorted(set(gallery.sizes)))}
    return BucketOrder(*shape, *place, tuple(numbers[gallery.sizes[picture]] for picture in gallery.shown))


def _dataset(gallery: Gallery, encoder: PipelineEncoder, cache: bool, trains_text: bool) -> LatentSet | PixelSet:
    tokens = encoder.tokens(list(gallery.captioned.captions)) if trains_text or not cache else None
    if not cache:
        return PixelSet(gallery, tokens)
    return LatentSet(gallery, tokens, encode(gallery, encoder, with_text=not trains_text))


def _validation(dataset: Any, gallery: Gallery, batch_size: int, accelerator: Accelerator) -> list[dict[str, Any]]:
    """This process's batches, each of one size, made once: their seeds hang on the pictures' places alone."""
    mine = range(accelerator.process_index, len(gallery), accelerator.num_processes)
    if len(gallery) < accelerator.num_processes:
        raise ConfigError(
            f"{len(gallery)} pictures to validate on are fewer than the {accelerator.num_processes} processes"
        )
    by_size: dict[Size, list[SampleKey]] = {}
    for index in mine:
        by_size.setdefault(gallery.sizes[index], []).append(SampleKey(_VALIDATION_SEED, 0, index))
    parts = [keys[i : i + batch_size] for keys in by_size.values() for i in range(0, len(keys), batch_size)]
    return list(batch_loader(dataset, parts, 0, pin=False))  # kept for the whole run
