"""Captioned pictures: a folder with metadata.jsonl (or .csv), with .txt or .caption files beside the pictures, or with
one prompt for all.

Captions come from anywhere: they are text and nothing else.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vislora.config.data import CaptionsData
from vislora.data.folder import SUFFIXES, files_below, lost_links, others, pictures_aside, pictures_below
from vislora.data.images import Facts, Problem
from vislora.data.inspection import inspect_files
from vislora.data.metadata import METADATA, metadata_rows, metadata_table
from vislora.data.quarantine import Labelled, leave_out
from vislora.data.rows import file_named
from vislora.data.splits import Chosen, Files, Pictures, parted
from vislora.errors import DataError
from vislora.paths import user_path

_TEXT = (".txt", ".caption")
_LONGEST = 4000  # characters; text encoders read some 75 words


@dataclass(frozen=True)
class Captioned:
    """N pictures with captions.

    Attributes:
        captions: N texts.
        names: N names for reports, such as paths.
        pictures: where the N pictures come from.
    """

    captions: Sequence[str]
    names: Sequence[str]
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.captions)

    def choose(self, indices: Sequence[int]) -> "Captioned":
        """These pictures alone."""
        captions, names = [self.captions[i] for i in indices], [self.names[i] for i in indices]
        return Captioned(captions, names, Chosen(self.pictures, indices))


@dataclass(frozen=True)
class CaptionedSplits:
    """What is learned, and what is validated on.

    Attributes:
        problems: files that were left out or need a look.
        facts: what is known about the pictures that lie in files, by name.
    """

    train: Captioned
    val: Captioned | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: Mapping[str, Facts] = field(default_factory=dict)


def captions_folder(config: CaptionsData) -> CaptionedSplits:
    """Read a folder of captioned pictures; files that can't be decoded or aren't named as pictures, captions without a
    picture, links that lead nowhere, and pictures that a metadata table passes over, are left out and named in
    `problems`.

    `config.prompt` is every picture's caption where it is given. Else metadata.jsonl or metadata.csv is read, in the
    form of Hugging Face's image folders ({"file_name": …, "text": …} a line), and without one the .txt or .caption file
    (as kohya's scripts name it) beside each picture.

    Raises:
        DataError: no such folder, no usable picture, a missing or malformed caption, or a name that leads elsewhere.
    """
    root = user_path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    every = {"train": _with_captions(config, root)}
    files, left_out = leave_out(every, config.quarantine, root)
    files = [(path, read()) for path, read in files["train"]]
    found = inspect_files([path for path, _ in files])
    below, table = [*files_below(root)], _table(config, root)
    beside = {_stem(path) for path in below if path.suffix.lower() not in _TEXT}
    problems = [
        *left_out,
        *(facts.problem for facts in found.values() if facts.problem is not None),
        *lost_links(below),
        *others(
            path
            for path in below
            if not (path.suffix.lower() in _TEXT and _stem(path) in beside) and path.name not in METADATA
        ),
    ]
    if table is not None:
        problems += pictures_aside(below, every, f"is not in {table.name}")
    pairs = [(path, text) for path, text in files if found[path].usable]
    if not pairs:
        unusable = sum(not problem.usable for problem in problems)
        because = f"; {unusable} were left out, {problems[0].what}" if unusable else f" ({' '.join(SUFFIXES)})"
        raise DataError(f"{root} holds no usable picture{because}")
    paths = [path for path, _ in pairs]
    if config.repeats == 1:
        problems += _repeats(root, paths)
    whole = Captioned([text for _, text in pairs], [str(path) for path in paths], Files(paths))
    facts = {str(path): facts for path, facts in found.items()}
    return CaptionedSplits(*_hold_out(whole, config.val_fraction), problems, facts)


def list_captions(config: CaptionsData) -> Labelled:
    """The pictures of a folder with their captions, whatever stands in a text file; "" where there is none.

    Raises:
        DataError: there is no such folder, or the captions are in a malformed table, or in two files.
    """
    root = user_path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    if _table(config, root) is not None:
        return {"train": [(path, _told(row, where)) for where, path, row in metadata_rows(root)]}
    return {"train": [(path, _as_it_is(path, config.prompt)) for path in pictures_below(root)]}


def picture_files(root: Path, key: str) -> list[Path]:
    """All pictures in a folder and below it, hidden ones aside.

    Args:
        key: the setting that the folder comes from, for messages.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise DataError(f"{key}={root}: there is no such folder")
    if not (found := pictures_below(root)):
        raise DataError(f"{key}={root} holds no picture ({' '.join(SUFFIXES)})")
    return found


def usable_pictures(root: Path, key: str) -> tuple[list[Path], list[Problem]]:
    """Of `picture_files` those that can be decoded; and the others, with the links to pictures that lead nowhere.

    Raises:
        DataError: there is no such folder, or no such picture in it.
    """
    found = inspect_files(picture_files(root, key))
    unusable = [facts.problem for facts in found.values() if not facts.usable]
    usable = [path for path, facts in found.items() if facts.usable]
    if not usable:
        raise DataError(f"{key}={root} holds no usable picture; {len(unusable)} were left out, {unusable[0].what}")
    return usable, [*unusable, *lost_links(files_below(root))]


def clean(text: str, where: str) -> str:
    """A caption in one line, without spaces around it.

    Raises:
        DataError: it is empty, longer than 4000 characters, or holds control characters or half ones.
    """
    line = " ".join(text.split())
    if not line:
        raise DataError(f"{where}: the caption is empty")
    if len(line) > _LONGEST:
        raise DataError(f"{where}: the caption has {len(line)} characters, more than {_LONGEST}")
    if odd := next((c for c in line if unicodedata.category(c) == "Cc"), None):
        raise DataError(f"{where}: the caption holds the control character {odd!r}")
    if half := next((c for c in line if unicodedata.category(c) == "Cs"), None):
        raise DataError(f"{where}: the caption holds {half!r}, one half of a character; write the whole one in UTF-8")
    return line


def _repeats(root: Path, pictures: Sequence[Path]) -> list[Problem]:
    """The folders in root that are named as kohya's scripts have it, `10_name` for ten repeats in every epoch; with
    four digits it is rather a year."""
    folders = sorted({path.parent for path in pictures if path.parent.parent == root})
    named = {folder: re.match(r"(\d{1,3})_", folder.name) for folder in folders}
    return [
        Problem(folder, f"{folder} asks for {told[1]} repeats", usable=True, kinds=("repeats",))
        for folder, told in named.items()
        if told and int(told[1]) > 1
    ]


def _table(config: CaptionsData, root: Path) -> Path | None:
    """The table that says which pictures there are, where one does."""
    return None if config.prompt is not None else metadata_table(root)


def _with_captions(config: CaptionsData, root: Path) -> list[tuple[Path, Callable[[], str]]]:
    """The pictures, each with what reads its caption: those that are left out need none."""
    if config.prompt is not None:
        return [(path, partial(clean, config.prompt, "data.prompt")) for path in pictures_below(root)]
    if _table(config, root) is not None:
        return [(path, partial(_told, row, where)) for where, path, row in metadata_rows(root)]
    return [(path, partial(_beside, path)) for path in pictures_below(root)]


def _beside(picture: Path) -> str:
    if (file := _text_file(picture)) is None:
        raise DataError(
            f"{picture} has no caption: write it into {picture.stem}.txt beside it, or all into {METADATA[0]}, "
            "or give one prompt for all pictures with data.prompt"
        )
    try:
        return clean(file.read_text(encoding="utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} isn't text in UTF-8: {error}") from None


def _as_it_is(picture: Path, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    file = _text_file(picture)
    return "" if file is None else file.read_text("utf-8-sig", "replace")


def _text_file(picture: Path) -> Path | None:
    """The file beside a picture that its caption stands in; None where there is none."""
    there = []
    for suffix in _TEXT:  # or in upper case
        named = (file_named(picture.parent, picture.with_suffix(end).name) for end in (suffix, suffix.upper()))
        there += [file for file in named if file.is_file()][:1]
    if len(there) > 1:
        raise DataError(f"{there[0]} and {there[1]} both hold a caption for {picture.name}; keep one")
    return there[0] if there else None


def _stem(file: Path) -> str:
    """What a picture's name and its text's have in common."""
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _told(row: dict[str, Any], where: str) -> str:
    if not isinstance(row.get("text"), str):
        raise DataError(f"{where}: text is {row.get('text')!r}; expected the picture's caption")
    return clean(row["text"], where)


def _hold_out(whole: Captioned, fraction: float) -> tuple[Captioned, Captioned | None]:
    """Pictures to learn from and to validate on, one with several captions on one side; which ones depends on their
    number alone."""
    names = list(dict.fromkeys(whole.names))
    held = round(fraction * len(names))
    if held == 0 or held == len(names):
        if fraction:
            raise DataError(f"data.val_fraction={fraction} of {len(names)} pictures leaves none on one side")
        return whole, None
    random.Random(0).shuffle(names)
    learned, validated = parted(whole.names, set(names[:held]))
    return whole.choose(learned), whole.choose(validated)
