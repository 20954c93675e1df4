"""Sheets of pictures, with lines of text under them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vislora.data.images import scaled
from vislora.files import replacing
from vislora.names import without_middle
from vislora.report.fonts import font_of

_GAP, _LINE = 6, 15
_SIZE = 11  # of the letters


@dataclass(frozen=True)
class Tile:
    """A picture and the lines under it."""

    picture: Image.Image
    lines: tuple[str, ...]


def contact_sheet(tiles: Sequence[Tile], columns: int, side: int = 144) -> Image.Image:
    """The tiles on white, `columns` of them in a row, each picture fitted into a square of `side` pixels."""
    columns = min(columns, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [side + _GAP + max(len(tile.lines) for tile in row) * _LINE for row in rows]
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, sum(heights) + _GAP), "white")
    pen, top = ImageDraw.Draw(sheet), _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left, picture = _GAP + column * (side + _GAP), scaled(tile.picture, side)
            sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            for n, text in enumerate(tile.lines):
                font = font_of(text, _SIZE)
                pen.text((left, top + side + 1 + n * _LINE), _shortened(text, side, font), "black", font)
        top += height
    return sheet


def save_grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], file: Path, names: Sequence[str] = ()
) -> None:
    """A sheet with a column for each caption, told in up to three lines under the last row, and names of the rows, if
    any, likewise under each of a row's pictures; small pictures are enlarged."""
    side = max(rows[0][0].size)
    side *= max(1, 160 // side)
    under = [[_wrapped(name, side, 3) if name else ()] * len(captions) for name in names or [""] * len(rows)]
    under[-1] = [own + _wrapped(caption, side, 3) for own, caption in zip(under[-1], captions, strict=True)]
    tiles = [Tile(*pair) for row, told in zip(rows, under, strict=True) for pair in zip(row, told, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        contact_sheet(tiles, len(captions), side).save(part, format="PNG")


def _wrapped(text: str, width: int, most: int) -> tuple[str, ...]:
    """At most so many lines, the last of which may be too long."""
    font, lines = font_of(text, _SIZE), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1] and len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = longer
    return tuple(lines)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Without as much of its middle as has to go."""
    text = short = " ".join(text.split())
    kept = len(text)
    while kept and font.getlength(short) > width:
        kept -= 1
        short = without_middle(text, kept)
    return short
