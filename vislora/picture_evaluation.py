"""Scores of adapters that draw: what they draw beside the base model from the same noise, and reference pictures.

`python -m vislora.evaluate` comes here with a pipeline's adapter. Each adapter, at each scale, is a row of the table.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from vislora.config.commands import EvaluateConfig
from vislora.config.data import CaptionedData, data_from_dict, data_to_dict
from vislora.config.training import Precision
from vislora.data.captions import usable_pictures
from vislora.data.images import Problem
from vislora.data.labels import class_name
from vislora.data.load import load_captions
from vislora.data.prompts import NEUTRAL, Prompt, noise_seed, read_prompts
from vislora.data.splits import Chosen, Files
from vislora.drawing import Sampling, draw, open_pipeline, pipeline_of, read_adapters, tell_cut_off
from vislora.errors import AdapterError, ConfigError, DataError, first_three
from vislora.lora import Adapter
from vislora.metrics.distances import frechet_distance, kernel_distance, sample_warning
from vislora.metrics.pictures import Estimate, StyleAxis, diversity, kept_content, mean_estimate
from vislora.metrics.updates import layer_updates
from vislora.models.backbone import Backbone, Seen
from vislora.models.clip import Clip
from vislora.names import printable, short_names
from vislora.paths import user_path
from vislora.pipeline import apply, unapply
from vislora.precision import new_accelerator
from vislora.recognizer import Recognizer, load_recognizer
from vislora.report.pictures import PictureEvaluation, PictureScores
from vislora.trainings import trainings


def evaluate_pictures(config: EvaluateConfig) -> PictureEvaluation:
    """Draw the prompts with each of `config.adapter` at each scale, and score what comes. Several processes share the
    drawing, and find the same. Files of the reference's folder that can't be read are left out, and named on the
    standard error stream.

    Raises:
        VisloraError: a mistake in the settings, the data, a model or an adapter.
    """
    accelerator = new_accelerator(Precision.fp32)
    names, adapters = short_names(config.adapter), read_adapters(config.model, config.adapter)
    with accelerator.main_process_first():  # so that one process prepares the caches
        judges = _judges(config, adapters, accelerator)
    pipe = open_pipeline(pipeline_of(config.model, config.adapter, adapters), config.precision)
    _check_fits(pipe, config.adapter, adapters)
    if accelerator.is_main_process:
        tell_cut_off(pipe, [prompt.text for prompt in judges.prompts])

    base = _draw(pipe, config, judges, "the base model", accelerator)
    axis = judges.axis(base)
    rows = [*judges.of_reference(), judges.of_drawn(base, base, axis, "base model", None, None)]
    updates = {}
    for name, adapter in zip(names, adapters, strict=True):
        applied = apply(pipe, adapter)
        updates[name] = layer_updates(applied.adapter, applied.models)
        for scale in config.scales:
            title = name if config.scales == [1.0] else f"{name}, scale {scale:g}"
            applied.scale = scale
            drawn = _draw(pipe, config, judges, title, accelerator)
            rows.append(judges.of_drawn(drawn, base, axis, title, name, scale))
        unapply(pipe)
    return PictureEvaluation(
        prompts=judges.prompts,
        seeds=config.seeds,
        rows=rows,
        reference=judges.source,
        backbone=(judges.backbone.name, judges.backbone.sha256),
        style=judges.style,
        warnings=judges.warnings(len(base.images), axis),
        updates=updates,
        left_out=judges.left_out,
    )


def _check_fits(pipe: Any, files: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Refuse an adapter that doesn't fit the pipeline before the base model and the adapters ahead of it have drawn."""
    for file, adapter in zip(files, adapters, strict=True):
        try:
            apply(pipe, adapter)
        except AdapterError as error:
            raise AdapterError(f"{file}: {error}") from None
        unapply(pipe)


@dataclass(frozen=True)
class _Drawn:
    """Pictures and what the backbone sees in them; of the prompts, and of unrelated ones."""

    images: list[Image.Image]
    seen: Seen
    unrelated: Seen


@dataclass(frozen=True)
class _Judges:
    """What pictures are compared with, and by whom."""

    prompts: list[Prompt]
    unrelated: list[Prompt]
    source: str
    reference: Sequence[Image.Image]
    left_out: list[str]
    reference_seen: Seen
    backbone: Backbone
    by_style: Recognizer | None
    style: str | None
    by_content: Recognizer | None
    labels: list[str] | None
    clip: Clip | None
    config: EvaluateConfig

    def of_reference(self) -> list[PictureScores]:
        """What the style classifier makes of the reference, which is the most that can be expected; nothing without
        one."""
        if self.by_style is None:
            return []
        taken = _taken_for(self.by_style, self.reference, [self.style] * len(self.reference))
        figures = {"style_class": self._mean(taken, 1)}
        return [PictureScores("reference", None, None, [], len(self.reference), figures)]

    def of_drawn(
        self,
        drawn: _Drawn,
        base: _Drawn,
        axis: StyleAxis | None,
        name: str,
        adapter: str | None,
        scale: float | None,
    ) -> PictureScores:
        """Score pictures against the base model's and the reference."""
        seeds, n = len(self.config.seeds), len(drawn.images)
        each = {} if axis is None else {"style": axis.along(drawn.seen.statistics)}
        each |= {
            "content": kept_content(drawn.seen.pooled, base.seen.pooled),
            "drift": 1 - kept_content(drawn.unrelated.pooled, base.unrelated.pooled),
        }
        if self.by_style is not None:
            each["style_class"] = _taken_for(self.by_style, drawn.images, [self.style] * n)
        if self.by_content is not None:
            each["content_class"] = _taken_for(self.by_content, drawn.images, _repeated(self.labels, seeds))
        if self.clip is not None:
            texts = _repeated([prompt.text for prompt in self.prompts], seeds)
            each["text_image"] = self.clip(drawn.images, texts, self.config.batch_size)
        figures = {key: self._mean(values, seeds) for key, values in each.items()}
        del each["drift"]  # of other pictures
        if seeds > 1:
            by_prompt = drawn.seen.pooled.reshape(len(self.prompts), seeds, -1)
            figures["diversity"] = self._mean(diversity(by_prompt), 1)
        figures["frechet"] = Estimate(frechet_distance(drawn.seen.pooled, self.reference_seen.pooled))
        units = None  # a few prompts can't be halved
        if len(self.prompts) >= 4:
            units = torch.arange(len(self.prompts)).repeat_interleave(seeds)
        kernel, interval = kernel_distance(drawn.seen.pooled, self.reference_seen.pooled, units, seed=self.config.seed)
        figures["kernel"] = Estimate(kernel, *interval)
        return PictureScores(name, adapter, scale, drawn.images, n, figures, each)

    def warnings(self, drawn: int, axis: StyleAxis | None) -> list[str]:
        warning = sample_warning(drawn, len(self.reference), self.reference_seen.pooled.shape[1])
        warnings = [] if warning is None else [warning]
        if axis is None:
            warnings.append(
                "style is left out: by so few pictures the reference can't be told from the base model's; give more "
                "prompts or reference pictures, or others as reference"
            )
        if self.left_out:
            warnings.append(f"left out of the reference: {len(self.left_out)} ({first_three(self.left_out)})")
        return warnings

    def axis(self, base: _Drawn) -> StyleAxis | None:
        """The way from the base model's style to the reference's; None where so few pictures don't tell it."""
        # of a single prompt each picture is one of several
        seeds = len(self.config.seeds) if len(self.prompts) > 1 else 1
        return StyleAxis.between(base.seen.statistics, self.reference_seen.statistics, seeds)

    def _mean(self, values: Tensor, seeds: int) -> Estimate:
        return mean_estimate(values, seeds, self.config.resamples, self.config.seed)


def _judges(config: EvaluateConfig, adapters: Sequence[Adapter], accelerator: Accelerator) -> _Judges:
    device = accelerator.device
    source, reference, captions, problems = _reference(config, adapters)
    left_out = [printable(problem.what) for problem in problems]
    for what in left_out:
        accelerator.print(f"left out: {what}", file=sys.stderr)
    prompts, unrelated = [Prompt(text) for text in captions], [Prompt(text) for text in NEUTRAL]
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, "prompts")
    if config.unrelated is not None:
        unrelated = read_prompts(config.unrelated, "unrelated")
    by_style = by_content = style = labels = None
    if config.style_classifier is not None:
        by_style = load_recognizer(config.style_classifier)
        by_style.model.to(device)
        style = _wanted_style(config, by_style, reference)
    if config.content_classifier is not None:
        by_content = load_recognizer(config.content_classifier)
        by_content.model.to(device)
        labels = [_label(prompt, by_content.classes) for prompt in prompts]
    if min(drawn := len(prompts) * len(config.seeds), len(reference)) < 4:
        raise DataError(
            f"{drawn} pictures to draw and {len(reference)} of reference: distances need four of each; give more "
            "prompts, seeds or reference pictures"
        )
    clip = None if config.clip is None else Clip(config.clip, device)
    backbone = Backbone(config.backbone, device)
    return _Judges(
        prompts=prompts,
        unrelated=unrelated,
        source=source,
        reference=reference,
        left_out=left_out,
        reference_seen=backbone(reference, config.batch_size),
        backbone=backbone,
        by_style=by_style,
        style=style,
        by_content=by_content,
        labels=labels,
        clip=clip,
        config=config,
    )


def _reference(
    config: EvaluateConfig, adapters: Sequence[Adapter]
) -> tuple[str, Sequence[Image.Image], list[str], list[Problem]]:
    """Where the reference pictures are from, the pictures, captions to draw where no prompts are given, and the files
    of the reference's folder that can't be used."""
    if config.reference is not None:
        files, problems = usable_pictures(user_path(config.reference), "reference")
        pictures = Chosen(Files(files), range(len(files)))
        if config.prompts is not None:
            return config.reference, pictures, [], problems
    told = [*zip(config.adapter, adapters, strict=True)]
    data = [(file, settings) for file, adapter in told for settings in _trained_on(file, adapter)]
    (first, whole), *_ = data
    if other := next((file for file, settings in data if _pictures_of(settings) != _pictures_of(whole)), None):
        missing = "reference=FOLDER" if config.reference is None else "prompts=FILE"
        who = f"{first} was trained" if other == first else f"{first} and {other} were trained"
        raise ConfigError(f"{who} on different pictures; give {missing}")
    splits = load_captions(whole)
    captions = list(dict.fromkeys((splits.val or splits.train).captions))
    if config.reference is not None:
        return config.reference, pictures, captions, problems
    pictures = Chosen(splits.train.pictures, range(len(splits.train)))
    return f"the {len(pictures)} pictures of the training", pictures, captions, []


def _trained_on(file: str, adapter: Adapter) -> list[CaptionedData]:
    """The data of the training, or trainings, behind an adapter."""
    try:
        found = [data_from_dict(one.get("data")) for one in trainings(adapter.about)]
    except ConfigError:
        found = []
    if not found or not all(isinstance(data, CaptionedData) for data in found):
        raise ConfigError(
            f"{file} doesn't tell the pictures of its training; give reference=FOLDER of pictures in the wanted style, "
            "and prompts=FILE"
        )
    return found


def _pictures_of(data: CaptionedData) -> dict[str, Any]:
    """What decides which pictures there are, with which captions; settings that all such data share tell how they are
    shown in training."""
    shared = {setting.name for setting in fields(CaptionedData)}
    return {key: value for key, value in data_to_dict(data).items() if key not in shared}


def _wanted_style(config: EvaluateConfig, by_style: Recognizer, reference: Sequence[Image.Image]) -> str:
    if config.style is None:
        found = Counter(_predicted(by_style, reference))
        return found.most_common(1)[0][0]
    if (style := class_name(config.style)) not in by_style.classes:
        raise ConfigError(f"style={config.style}: {config.style_classifier} tells {', '.join(by_style.classes)}")
    return style


def _label(prompt: Prompt, classes: Sequence[str]) -> str:
    """The class a prompt should show: its label, or the class that its text names; a "blue jay" is no "jay"."""
    if prompt.label is not None:
        if (label := class_name(prompt.label)) not in classes:
            raise DataError(f"{prompt.label!r}, the label of {prompt.text!r}, is no class of the content classifier")
        return label
    named = [name for name in classes if _names(prompt.text, name)]
    if not named:
        raise DataError(
            f"{prompt.text!r} has no label, and names no class of the content classifier; write `prompt | label`"
        )
    longest = max(named, key=len)
    if other := [name for name in named if not _names(longest, name)]:
        raise DataError(f"{prompt.text!r} names {longest!r} and {other[0]!r}; tell which one, as `prompt | label`")
    return longest


def _names(text: str, name: str) -> bool:
    """Whether a name is in a text in whole words."""
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", class_name(text).casefold()) is not None


def _draw(pipe, config: EvaluateConfig, judges: _Judges, who: str, accelerator: Accelerator) -> _Drawn:
    def pictures(prompts: Sequence[Prompt]) -> list[Image.Image]:
        jobs = [(prompt.text, noise_seed(seed, prompt.text)) for prompt in prompts for seed in config.seeds]
        sampling = Sampling(config.steps, config.guidance, config.size)
        return draw(pipe, jobs, sampling, config.drawn_at_once, f"{who} draws", accelerator)

    images = pictures(judges.prompts)
    return _Drawn(
        images,
        judges.backbone(images, config.batch_size),
        judges.backbone(pictures(judges.unrelated), config.batch_size),
    )


def _predicted(recognizer: Recognizer, images: Sequence[Image.Image]) -> list[str]:
    parts = [recognizer(images[i : i + 64]).argmax(1).tolist() for i in range(0, len(images), 64)]
    return [recognizer.classes[k] for part in parts for k in part]


def _taken_for(recognizer: Recognizer, images: Sequence[Image.Image], wanted: Sequence[str]) -> Tensor:
    """1 for each picture that the recogniser takes for what was wanted, 0 for the others, [N]."""
    found = _predicted(recognizer, images)
    return torch.tensor([float(one == other) for one, other in zip(found, wanted, strict=True)], dtype=torch.float64)


def _repeated(values: Sequence[str], times: int) -> list[str]:
    return [value for value in values for _ in range(times)]
