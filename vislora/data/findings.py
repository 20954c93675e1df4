"""What can be wrong or odd about a data set, one function for each; nothing is opened here."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from vislora.data.duplicates import copies
from vislora.data.images import Facts, Problem
from vislora.data.labels import misspelled
from vislora.data.wording import CaptionFigures

_SPLITS = ("test", "val", "train")  # of copies the one in the first of these stays
_FEW = 5  # pictures of a class to train on, below which it is told
_UNEVEN = 10  # times as many pictures as the smallest class, from which it is told


class Level(Enum):
    """How much a finding matters."""

    bad = "bad"  # harms training or its figures
    check = "check"  # someone should look
    note = "note"  # dealt with; good to know


@dataclass(frozen=True)
class Item:
    """A file, or a class, by its name, and what about it."""

    name: str
    what: str


@dataclass(frozen=True)
class Finding:
    """Something about a data set.

    Attributes:
        kind: one word for programs, as "damaged", "leak" or "misspelled".
        what: a sentence.
        remedy: what to do; empty where nothing is to be done.
        items: whom it concerns.
    """

    kind: str
    level: Level
    what: str
    remedy: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Row:
    """A picture that can be used: its label or caption, and what is known about its file."""

    name: str
    split: str
    label: str | None = None
    caption: str | None = None
    facts: Facts | None = None


UNUSABLE = {  # what a file of each kind is
    "missing": "missing files",
    "empty": "empty files",
    "unknown": "files that are no images, or of an unknown kind",
    "huge": "files too large to be decoded safely",
    "damaged": "damaged files",
}
_ODD = {
    "gone": (Level.check, "listed in the quarantine but not there", "correct the list, or delete their lines"),
    "quarantined": (Level.note, "left out as the quarantine says", ""),
    "unlabelled": (Level.check, "pictures without a label, not read", "label them, if they belong there"),
    "aside": (Level.check, "pictures in no class folder or metadata table, not read", "add them, if they belong there"),
    "unread": (Level.check, "links and labels in shards, without a picture", "pack the pictures, if they belong there"),
    "suffix": (Level.check, "files of another format than their suffix says", "rename them, other programs may fail"),
    "animated": (Level.check, "animated files, whose first frame is used", "leave out those where it shows nothing"),
    "repeats": (Level.check, "folders that ask for repeats by their names, not heeded", "give data.repeats=N for all"),
    "large": (Level.check, "very large files, slow to decode", "scale them down"),
    "other": (Level.note, "files without a picture's suffix, not read", ""),
    "split": (Level.note, "splits beside train, val and test, not read", ""),
    "deep": (Level.note, "files of more than 8 bits per channel, scaled to 8", ""),
    "transparent": (Level.note, "transparent files, composited on white", ""),
    "colours": (Level.note, "files in other colours than RGB, converted", ""),
    "rotated": (Level.note, "files turned upright as their EXIF orientation says", ""),
}


def about_files(problems: Sequence[Problem]) -> list[Finding]:
    """Files that can't be used, and odd ones."""
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for problem in problems:
        name = str(problem.file)
        for kind in problem.kinds:
            by_kind[kind].append(Item(name, problem.what.removeprefix(name).strip()))
    remedy = "repair or delete them; training leaves them out"
    kinds = {kind: (Level.bad, what, remedy) for kind, what in UNUSABLE.items()} | _ODD
    return [
        Finding(kind, level, f"{what}: {len(by_kind[kind]):,}", remedy, tuple(by_kind[kind]))
        for kind, (level, what, remedy) in kinds.items()
        if kind in by_kind
    ]


def groups_of_copies(rows: Sequence[Row]) -> list[list[Row]]:
    """Each with the picture that should stay first: that of the test split, and the largest one."""
    known = [row for row in rows if row.facts is not None]

    def rank(row: Row) -> tuple[int, int, str]:
        return _SPLITS.index(row.split), -row.facts.width * row.facts.height, row.name

    groups = copies([row.facts.thumbnail for row in known])
    return [sorted((known[i] for i in group), key=rank) for group in groups]


def about_copies(groups: list[list[Row]]) -> list[Finding]:
    """Copies across splits, with another label, and superfluous ones."""
    leaks, conflicts, superfluous = [], [], []
    for kept, *others in groups:
        for row in others:
            if row.split != kept.split:
                leaks.append(Item(row.name, f"in {row.split}, is a copy of {kept.name} in {kept.split}"))
            if row.label != kept.label:
                conflicts.append(Item(row.name, f"{row.label!r}, is a copy of {kept.name}, {kept.label!r}"))
            if row.split == kept.split and row.label == kept.label:
                listed_twice = row.name == kept.name
                superfluous.append(Item(row.name, "is listed twice" if listed_twice else f"is a copy of {kept.name}"))
    kinds = (
        ("leak", Level.bad, "copies across splits", "keep one, or what is learned by heart counts as known", leaks),
        ("conflict", Level.bad, "copies with another label", "keep the one whose label is right", conflicts),
        ("copies", Level.check, "copies within a split", "keep one of each, or they count twice", superfluous),
    )
    return [
        Finding(kind, level, f"{what}: {len(items):,}", remedy, tuple(items))
        for kind, level, what, remedy, items in kinds
        if items
    ]


def superfluous_files(groups: list[list[Row]]) -> dict[str, str]:
    """The copies to be left out, so that one of each stays, and none where their labels differ; with the reason."""
    reasons = {}
    for kept, *others in groups:
        if any(row.label != kept.label for row in others):
            reasons |= {
                row.name: "copies with different labels: keep the one whose label is right" for row in (kept, *others)
            }
        else:
            # a file that is listed twice would be left out altogether
            reasons |= {row.name: "copies of a picture that stays" for row in others if row.name != kept.name}
    return reasons


def about_classes(classes: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    """Classes of few pictures, by the numbers of pictures by class and split."""
    if not classes:
        return []
    train = {name: counts.get("train", 0) for name, counts in classes.items()}
    most = max(train, key=train.__getitem__)
    few = [Item(name, f"{count} to train on") for name, count in train.items() if count < _FEW]
    small = [
        Item(name, f"{count} to train on") for name, count in train.items() if _FEW <= count <= train[most] / _UNEVEN
    ]
    kinds = [
        ("few", f"classes of fewer than {_FEW} pictures to train on", "add some, or leave the class out", few),
        ("uneven", f"classes of less than a {_UNEVEN}th of {most!r}", "judge by balanced accuracy", small),
    ]
    for split in ("val", "test"):
        absent = [Item(name, f"none in {split}") for name, counts in classes.items() if split not in counts]
        if len(absent) < len(classes):
            kinds.append(("absent", f"classes without a picture in {split}", "add some, to measure them", absent))
    return [
        Finding(kind, Level.check, f"{what}: {len(items):,} of {len(train):,}", remedy, tuple(items))
        for kind, what, remedy, items in kinds
        if items
    ]


def about_names(rows: Sequence[Row]) -> list[Finding]:
    """Labels that may be one misspelled."""
    counts = Counter(row.label for row in rows if row.label is not None)
    items = []
    for rare, frequent in misspelled(counts):
        what = f"labelled {rare!r}; {counts[frequent]:,} others are labelled {frequent!r}"
        items += [Item(row.name, what) for row in rows if row.label == rare]
    if not items:
        return []
    what = f"pictures whose label may be another one misspelled: {len(items):,}"
    return [Finding("misspelled", Level.check, what, "give them the same name if they are one class", tuple(items))]


def about_sizes(shorter_sides: Sequence[int], input_size: int) -> list[Finding]:
    """Pictures smaller than the model's input, in pixels."""
    smaller = sum(side < input_size for side in shorter_sides)
    if not smaller:
        return []
    share = smaller / len(shorter_sides)
    what = f"pictures smaller than the model's {input_size} pixels, hence upscaled: {share:.0%}"
    # a note alone: pictures of 32 pixels are told apart better at 112 than as they are
    return [Finding("upscaled", Level.note, what, "", ())]


def about_captions(figures: CaptionFigures, rows: Sequence[Row]) -> list[Finding]:
    """What the figures of the rows' captions tell."""
    kinds = (
        ("uncaptioned", "pictures without a caption", "write one, or leave them out", figures.empty),
        (
            "cut",
            "captions longer than the text encoder reads",
            "shorten them: their end counts for nothing",
            figures.cut,
        ),
        ("encoding", "captions with odd characters", "save them as UTF-8", figures.odd),
    )
    return [
        Finding(
            kind,
            Level.check,
            f"{what}: {len(indices):,}",
            remedy,
            tuple(Item(rows[i].name, rows[i].caption[:80]) for i in indices),
        )
        for kind, what, remedy, indices in kinds
        if indices
    ]
