"""A labelled set of pictures, and the splits of a data set."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vislora.data.images import Problem, read_image


class Pictures(Protocol):
    """Where pictures come from: an index in, an RGB picture out."""

    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class Files:
    """Pictures in files, decoded when asked for."""

    paths: Sequence[Path]

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])


@dataclass(frozen=True)
class Pixels:
    """Pictures in memory: uint8 [N, H, W, 3]."""

    array: np.ndarray

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


@dataclass(frozen=True)
class Chosen:
    """Some of another source's pictures, in the order of `indices`."""

    pictures: Pictures
    indices: Sequence[int]

    def __getitem__(self, index: int) -> Image.Image:
        return self.pictures[self.indices[index]]


@dataclass(frozen=True)
class ImageSplit:
    """N labelled pictures.

    Attributes:
        classes: K names.
        labels: N indices into classes.
        names: N names for reports, such as paths.
        pictures: where the N pictures come from.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]
    names: Sequence[str]
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The picture, RGB."""
        return self.pictures[index]

    def choose(self, indices: Sequence[int]) -> "ImageSplit":
        """The split of these pictures alone."""
        labels, names = [self.labels[i] for i in indices], [self.names[i] for i in indices]
        return ImageSplit(self.classes, labels, names, Chosen(self.pictures, indices))


@dataclass(frozen=True)
class Splits:
    """A data set; `problems` are files that were left out or need a look."""

    train: ImageSplit
    val: ImageSplit | None = None
    test: ImageSplit | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def hold_out(split: ImageSplit, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Divide a split into one to train on and one to validate on, class by class.

    Each class gives `fraction` of its pictures, at least one where it has two; the choice depends on the pictures'
    names and the seed, not on the order they are listed in.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(split.labels):
        by_class.setdefault(label, []).append(index)
    kept, held = [], []
    for label, members in sorted(by_class.items()):
        members = sorted(members, key=lambda i: split.names[i])
        random.Random(f"{seed} {split.classes[label]}").shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += members[:count]
        kept += members[count:]
    return split.choose(sorted(kept)), split.choose(sorted(held))
