"""What things are called in tables and messages."""

from collections.abc import Sequence
from pathlib import Path
from unicodedata import category, east_asian_width, normalize

from vislora.errors import ConfigError


def short_names(folders: list[str]) -> list[str]:
    """A name for each folder: its own, or the run's it is in, with as much before it as tells them apart.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = [Path(folder).absolute() for folder in folders]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ConfigError(f"adapter: {twice[0]} is named twice")
    names = ends([path.parent if path.name in ("adapter", "model") else path for path in paths])
    return names if len({*names}) == len(names) else [str(path) for path in paths]  # RUN/adapter and RUN/model


def without_middle(name: str, kept: int) -> str:
    """So many letters of a name, half of them from either end: classes often differ at their ends alone."""
    return f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"


def ends(paths: list[Path]) -> list[str]:
    """As much of the end of each path as tells them all apart."""
    names: list[str] = []
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len({*names}) == len(names):
            break
    return names


def printable(text: str) -> str:
    """A text as it can be shown on a line of a terminal, which a line's end or an escape would lead astray."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a table for a terminal; its first columns, `left` of them, are aligned to the left."""
    cells = [[printable(cell) for cell in row] for row in rows]
    wide = [max(map(_columns, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        gaps = [" " * (width - _columns(cell)) for cell, width in zip(row, wide, strict=True)]
        filled = [cell + gap if i < left else gap + cell for i, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(filled).rstrip())
    return lines


def _columns(text: str) -> int:
    """Of a terminal: a Chinese, Japanese or Korean letter takes two, a mark over or under another letter none."""
    letters = [letter for letter in normalize("NFC", text) if category(letter) not in ("Mn", "Me")]
    return sum(1 + (east_asian_width(letter) in "FW") for letter in letters)
