"""A list of files to be left out of a data set, one a line, which a person can read and edit.

A path is relative to the data's root, or absolute. A line that starts with # is a remark; one that starts with a
quotation mark is a JSON string, for names that don't fit on a plain line.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from vislora.data.images import Problem
from vislora.data.rows import file_named
from vislora.errors import DataError
from vislora.files import write_text
from vislora.paths import user_path

T = TypeVar("T")
Labelled = dict[str, list[tuple[Path, str]]]  # (file, class name) pairs by split


def write_quarantine(reasons: Mapping[str, str], root: Path | None, path: Path) -> None:
    """Write a list from the reason to leave out each file; files of one reason stand together."""
    lines = ["# Files to be left out of training: data.quarantine=THIS_FILE. Delete a line to keep its file."]
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        lines += ["", f"# {reason}", *(_line(_relative(name, root)) for name in sorted(names))]
    write_text("\n".join(lines) + "\n", path)


def leave_out(
    files: dict[str, list[tuple[Path, T]]], quarantine: str | None, root: Path
) -> tuple[dict[str, list[tuple[Path, T]]], list[Problem]]:
    """The files without the listed ones; and each listed one as a Problem, those that don't exist too.

    Raises:
        DataError: the list is missing, or a line names what isn't one of the files.
    """
    if quarantine is None:
        return files, []
    lines = _read(user_path(quarantine))
    known = {_plain(path) for pairs in files.values() for path, _ in pairs}
    listed: dict[Path, Problem] = {}
    for number, name in lines:
        path = _plain(file_named(root, name))
        where = f"{quarantine}, line {number}"
        if path in known:
            listed[path] = Problem(root / name, f"left out by {where}", usable=False, kinds=("quarantined",))
        elif not path.suffix or os.path.exists(path):
            raise DataError(f"{where}: {name!r} is none of the pictures in {root}; delete the line or correct it")
        else:
            listed[path] = Problem(root / name, f"{where}: there is no such file", usable=False, kinds=("gone",))
    kept = {split: [pair for pair in pairs if _plain(pair[0]) not in listed] for split, pairs in files.items()}
    return kept, list(listed.values())


def _plain(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _relative(name: str, root: Path | None) -> str:
    path = Path(name)
    return path.relative_to(root).as_posix() if root is not None and path.is_relative_to(root) else name


def _line(name: str) -> str:
    fits = name.isprintable() and name.strip() == name and name[:1] not in ("#", '"')
    return name if fits else json.dumps(name)


def _read(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"data.quarantine={path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.quarantine={path} can't be read as text in UTF-8: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith('"'):
            try:
                line = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} starts with a quotation mark but is no JSON: {error}") from None
        found.append((number, line))
    return found
