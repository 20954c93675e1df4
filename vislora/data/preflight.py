"""A data set looked through as a whole, before anything is trained on it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vislora.data.captions import CaptionedSplits
from vislora.data.findings import (
    UNUSABLE,
    Finding,
    Level,
    Row,
    about_captions,
    about_classes,
    about_copies,
    about_files,
    about_names,
    about_sizes,
    groups_of_copies,
    superfluous_files,
)
from vislora.data.images import Problem
from vislora.data.splits import Splits
from vislora.data.wording import CaptionFigures, caption_figures, longer_than_clip_reads


@dataclass(frozen=True)
class Sizes:
    """The shorter sides, in pixels, of the pictures that lie in files."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True)
class Preflight:
    """What was found out about a data set.

    Attributes:
        error: why it can't be used; None where it can.
        pictures: usable ones by split.
        classes: usable pictures by class and split.
        sizes: of the pictures, where they are known.
        input_size: pixels of a side of the model's input, where it is known.
        captions: figures of the captions, where there are any.
        findings: worst first.
        leave_out: files that should be left out, with the reason: those that are already, and what was found beside
            them; empty where nothing was.
    """

    error: str | None
    pictures: dict[str, int]
    classes: dict[str, dict[str, int]]
    sizes: Sizes | None
    input_size: int | None
    captions: CaptionFigures | None
    findings: tuple[Finding, ...]
    leave_out: dict[str, str]

    @property
    def usable(self) -> bool:
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        findings = [asdict(finding) | {"level": finding.level.value} for finding in self.findings]
        return {"usable": self.usable} | asdict(self) | {"findings": findings}


def rows_of(splits: Splits) -> list[Row]:
    """The usable pictures of a labelled data set."""
    there = {"train": splits.train, "val": splits.val, "test": splits.test}
    return [
        Row(name, split, part.classes[label], facts=splits.facts.get(name))
        for split, part in there.items()
        if part is not None
        for name, label in zip(part.names, part.labels, strict=True)
    ]


def captioned_rows_of(splits: CaptionedSplits) -> list[Row]:
    """The usable pictures of a captioned data set."""
    there = {"train": splits.train, "val": splits.val}
    return [
        Row(name, split, caption=caption, facts=splits.facts.get(name))
        for split, part in there.items()
        if part is not None
        for name, caption in zip(part.names, part.captions, strict=True)
    ]


def look_through(
    rows: Sequence[Row],
    problems: Sequence[Problem],
    input_size: int | None,
    error: str | None = None,
    cut_off: Callable[[Sequence[str]], list[int]] = longer_than_clip_reads,
) -> Preflight:
    """Look through a data set, without opening a file.

    Args:
        rows: the usable pictures.
        problems: files that can't be used, or are odd.
        input_size: pixels of a side of the model's input, where it is known.
        error: why the data set as a whole can't be used.
        cut_off: captions -> indices of those that the text encoder doesn't read to the end.
    """
    classes: dict[str, dict[str, int]] = defaultdict(dict)
    for (label, split), count in Counter((row.label, row.split) for row in rows if row.label is not None).items():
        classes[label][split] = count
    captioned = [row for row in rows if row.caption is not None]
    captions = caption_figures([row.caption for row in captioned], cut_off) if captioned else None
    sides = [min(row.facts.width, row.facts.height) for row in rows if row.facts is not None]
    groups = groups_of_copies(rows)
    findings = [
        *about_files(problems),
        *about_copies(groups),
        *about_classes(classes),
        *about_names(rows),
        *(about_captions(captions, captioned) if captions is not None else ()),
        *(about_sizes(sides, input_size) if input_size is not None else ()),
    ]
    first = {str(problem.file): problem.kinds[0] for problem in problems}
    already = {name: "left out already" for name, kind in first.items() if kind == "quarantined"}
    unusable = {name: UNUSABLE[kind] for name, kind in first.items() if kind in UNUSABLE and kind != "missing"}
    found = unusable | superfluous_files(groups)
    return Preflight(
        error=error,
        pictures=dict(Counter(row.split for row in rows)),
        classes=dict(classes),
        sizes=Sizes(min(sides), float(np.median(sides)), max(sides)) if sides else None,
        input_size=input_size,
        captions=captions,
        findings=tuple(sorted(findings, key=lambda finding: list(Level).index(finding.level))),
        leave_out=already | found if found else {},  # the new list takes the place of the one there is
    )
