"""python -m vislora.preflight data=imagefolder data.root=pictures [what else the training will be given]

Looks a data set through before a training: files that can't be used or are odd, copies of one picture, also across
splits, labels misspelled, classes and captions that are few or odd, sizes against the model's input. Writes
preflight.json, and quarantine.txt for `data.quarantine=…`. The exit code is 2 where the data can't be trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config.data import BaseData, CaptionedData
from vislora.config.model import ModelConfig, PipelineConfig
from vislora.config.training import TrainConfig
from vislora.errors import DataError, ModelError
from vislora.paths import absolute, user_path

if TYPE_CHECKING:
    from vislora.data.captions import Captioned
    from vislora.data.findings import Row
    from vislora.data.images import Facts, Problem
    from vislora.data.preflight import Preflight
    from vislora.data.splits import ImageSplit


def preflight(config: TrainConfig) -> Preflight:
    """Look through the data set of a training (from `vislora.compose.configure("preflight", [...])`).

    Every picture is decoded. What was found about files is kept in the cache, so that an interrupted run goes on.

    Raises:
        VisloraError: the data can't even be listed, or a setting can't be used.
    """
    from vislora.data.load import list_files
    from vislora.data.preflight import look_through

    data = config.data
    if getattr(data, "root", None) is not None:
        data = replace(data, root=absolute(data.root))
    size, cut_off = _input_size(config), _cut_off(config)
    try:
        rows, problems = _loaded(data, config.seed)
    except DataError as error:
        if list_files(data) is None:
            raise
        rows, problems = _listed(data)
        return look_through(rows, problems, size, str(error), cut_off)
    return look_through(rows, problems, size, cut_off=cut_off)


def _loaded(data: BaseData, seed: int) -> tuple[list[Row], list[Problem]]:
    """The usable pictures as training will have them."""
    from vislora.data.load import load_captions, load_splits
    from vislora.data.preflight import captioned_rows_of, rows_of

    captioned = isinstance(data, CaptionedData)
    splits = load_captions(data) if captioned else load_splits(data, seed)
    if not splits.facts:
        parts = [splits.train, splits.val] if captioned else [splits.train, splits.val, splits.test]
        facts = [_facts_in_memory(part) for part in parts if part is not None]
        splits = replace(splits, facts={name: fact for part in facts for name, fact in part.items()})
    return captioned_rows_of(splits) if captioned else rows_of(splits), splits.problems


def _listed(data: BaseData) -> tuple[list[Row], list[Problem]]:
    """The usable pictures as they lie there, without those that the quarantine lists."""
    from vislora.data.findings import Row
    from vislora.data.inspection import inspect_files
    from vislora.data.load import list_files
    from vislora.data.quarantine import leave_out

    listed, left_out = list_files(data), []
    with suppress(DataError):  # of the list itself, which is what loading told
        listed, left_out = leave_out(listed, data.quarantine, Path(data.root))
    found = inspect_files([path for pairs in listed.values() for path, _ in pairs])
    kind = "caption" if isinstance(data, CaptionedData) else "label"
    rows = [
        Row(str(path), split, facts=found[path], **{kind: text})
        for split, pairs in listed.items()
        for path, text in pairs
        if found[path].usable
    ]
    return rows, [*left_out, *(facts.problem for facts in found.values() if facts.problem is not None)]


def _facts_in_memory(part: ImageSplit | Captioned) -> dict[str, Facts]:
    """Of pictures that don't lie in files of their own, by name."""
    from vislora.data.images import Facts, thumbnail
    from vislora.data.splits import ImageSplit

    def look(index: int) -> Facts:
        picture = part.image(index) if isinstance(part, ImageSplit) else part.pictures[index]
        return Facts(None, *picture.size, thumbnail(picture))

    with ThreadPoolExecutor() as pool:
        return dict(zip(part.names, pool.map(look, range(len(part))), strict=True))


def _input_size(config: TrainConfig) -> int | None:
    """Pixels of a side of what the model sees; None where the model isn't one for the data."""
    if isinstance(config.data, CaptionedData):
        if config.data.size is None and isinstance(config.model, PipelineConfig):
            from vislora.models.diffusion import resolution

            return resolution(config.model)
        return config.data.size
    if not isinstance(config.model, ModelConfig):
        return None

    import torch

    from vislora.models.vit import build_vit, preprocessing

    with torch.device("meta"):  # which has no weights
        return preprocessing(build_vit(replace(config.model, weights="random"), 2)).size


def _cut_off(config: TrainConfig) -> Callable[[Sequence[str]], list[int]]:
    """What tells the captions that aren't read to their end: by the pipeline's tokenizers, where they can be had."""
    from vislora.data.wording import longer_than_clip_reads

    if not (isinstance(config.data, CaptionedData) and isinstance(config.model, PipelineConfig)):
        return longer_than_clip_reads
    from vislora.models.denoiser import cut_off
    from vislora.models.diffusion import readers_of

    try:
        found = readers_of(config.model)
    except ModelError:
        found = []
    return partial(cut_off, found) if found else longer_than_clip_reads


def _main(config: TrainConfig, out: Path) -> None:
    from vislora.data.quarantine import write_quarantine
    from vislora.files import write_json
    from vislora.report.preflight import summary

    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    found = preflight(config)
    out.mkdir(parents=True, exist_ok=True)
    write_json(found.to_dict(), out / "preflight.json")
    root = user_path(config.data.root).absolute() if getattr(config.data, "root", None) else None
    quarantine = None
    if found.leave_out and hasattr(config.data, "quarantine"):
        quarantine = out / "quarantine.txt"
        write_quarantine(found.leave_out, root, quarantine)
    print(summary(found, root, quarantine))
    print(f"\nall of it: {out / 'preflight.json'}")
    if not found.usable:
        raise DataError(found.error)


if __name__ == "__main__":
    command("preflight", _main)
