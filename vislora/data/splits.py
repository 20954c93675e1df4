"""A labelled set of pictures, and the splits of a data set."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vislora.data.cache import content_key, pictures_key
from vislora.data.images import Facts, Place, Problem, read_image
from vislora.data.inspection import inspect_files
from vislora.errors import DataError, first_three

SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Pictures(Protocol):
    """Where pictures come from: an index in, an RGB picture out."""

    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class Files:
    """Pictures in files of their own, or else in larger files at `places`, decoded when asked for."""

    paths: Sequence[Path]
    places: Mapping[Path, Place] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index], self.places.get(self.paths[index]))


@dataclass(frozen=True)
class Pixels:
    """Pictures in memory: uint8 [N, H, W, 3]."""

    array: np.ndarray

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some of another source's pictures, in the order of `indices`; decoded whenever they are looked at."""

    pictures: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int | slice) -> "Image.Image | Chosen":
        chosen = self.indices[place]
        return Chosen(self.pictures, chosen) if isinstance(place, slice) else self.pictures[chosen]


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
        """The picture, RGB.

        Raises:
            DataError: it can't be decoded.
        """
        try:
            return self.pictures[index]
        except DataError:
            raise
        except Exception as error:  # decoders of other packages raise many classes, and most don't name the picture
            raise DataError(f"{self.names[index]} can't be decoded: {error}; replace it") from error

    def choose(self, indices: Sequence[int]) -> "ImageSplit":
        """The split of these pictures alone."""
        labels, names = [self.labels[i] for i in indices], [self.names[i] for i in indices]
        return ImageSplit(self.classes, labels, names, Chosen(self.pictures, indices))


@dataclass(frozen=True)
class Splits:
    """A data set.

    Attributes:
        held_out: whether val was held out of train.
        problems: files that were left out or need a look.
        facts: what is known about the pictures that lie in files, by name.
        elsewhere: a hash of those that don't.
    """

    train: ImageSplit
    val: ImageSplit | None = None
    test: ImageSplit | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: Mapping[str, Facts] = field(default_factory=dict)
    elsewhere: str | None = None
    held_out: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def held_out_key(self) -> str | None:
        """A hash of the pictures, and their names, that were held out of train; None where none were."""
        if not self.held_out:
            return None
        return content_key(*self.val.names, pictures_key(self.val.names, self.facts, self.elsewhere))


def splits_of_files(
    files: dict[str, list[tuple[Path, str]]],
    classes: tuple[str, ...],
    left_out: Sequence[Problem] = (),
    needed: Sequence[str] | None = None,
    places: Mapping[Path, Place] | None = None,
) -> Splits:
    """Splits from (file, class name) pairs by split, without the files that can't be decoded.

    Args:
        files: by "train", "val" and "test"; a split without a file is left out.
        left_out: the files of the data set that aren't among them, to be told with the rest.
        needed: classes that must have a usable file to train on; all by default.
        places: of the pictures that lie in larger files, and whose paths are but names.

    Raises:
        DataError: a file of another class, a class without a usable file to train on, or a split whose files are all
            unusable.
    """
    column = {name: k for k, name in enumerate(classes)}
    for split, pairs in files.items():
        if odd := next((pair for pair in pairs if pair[1] not in column), None):
            raise DataError(f"{split}: class {odd[1]!r} of {odd[0]} isn't among those of train: {first_three(classes)}")
    places = places or {}
    found = inspect_files([path for pairs in files.values() for path, _ in pairs], places)
    splits: dict[str, ImageSplit] = {}
    for name, pairs in files.items():
        usable = [(path, column[label]) for path, label in pairs if found[path].usable]
        if pairs and not usable and name != "train":  # of which the class is told below
            raise DataError(
                f"{name} has no usable picture ({len(pairs)} files were left out; {found[pairs[0][0]].problem.what}); "
                "repair them, or take the split away"
            )
        if usable:
            paths, labels = [path for path, _ in usable], [label for _, label in usable]
            splits[name] = ImageSplit(classes, labels, [str(path) for path in paths], Files(paths, places))
    problems = [*left_out, *(facts.problem for facts in found.values() if facts.problem is not None)]
    present = set(splits["train"].labels) if "train" in splits else set()
    if absent := [name for name in needed or classes if column[name] not in present]:
        bad = [problem for problem in problems if not problem.usable]
        because = f" ({len(bad)} files were left out; {bad[0].what})" if bad else ""
        raise DataError(f"class {absent[0]!r} has no usable picture to train on{because}")
    facts = {str(path): facts for path, facts in found.items()}
    return Splits(splits["train"], splits.get("val"), splits.get("test"), problems, facts)


def hold_out(split: ImageSplit, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """Divide a split into one to train on and one to validate on, class by class.

    Each class gives `fraction` of its pictures, at least one where it has two; the choice depends on the pictures'
    names and the seed, not on the order they are listed in. A picture that is listed several times counts as one, and
    is on one side; one that is listed in several classes is trained on.

    Raises:
        DataError: no class has two pictures.
    """
    labels: dict[str, set[int]] = {}
    for name, label in zip(split.names, split.labels, strict=True):
        labels.setdefault(name, set()).add(label)
    by_class: dict[int, list[str]] = {}
    for name in sorted(labels):
        if len(labels[name]) == 1:
            by_class.setdefault(*labels[name], []).append(name)
    chosen: set[str] = set()
    for label, names in by_class.items():
        random.Random(f"{seed} {split.classes[label]}").shuffle(names)
        chosen.update(names[: min(max(1, round(fraction * len(names))), len(names) - 1)])
    if not chosen:
        raise DataError("data.val_fraction: each class has a single picture, so that none can be held out; set it to 0")
    kept, held = parted(split.names, chosen)
    return split.choose(kept), split.choose(held)


def parted(names: Sequence[str], chosen: Collection[str]) -> tuple[list[int], list[int]]:
    """The places of names that aren't chosen, and of those that are, wherever one is listed."""
    places: tuple[list[int], list[int]] = [], []
    for place, name in enumerate(names):
        places[name in chosen].append(place)
    return places
