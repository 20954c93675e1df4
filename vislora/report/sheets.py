"""Pictures in rows with a caption under each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE = 6, 15
# Pillow's own font has no arrows, and few scripts
FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@dataclass(frozen=True)
class Tile:
    """A picture and the lines under it."""

    picture: Image.Image
    lines: tuple[str, ...]


def contact_sheet(tiles: Sequence[Tile], columns: int, side: int = 144) -> Image.Image:
    """The tiles on white, `columns` of them in a row, each picture fitted into a square of `side` pixels."""
    font = ImageFont.truetype(FONT, 11)
    lines = max(len(tile.lines) for tile in tiles)
    wide, high = side + _GAP, side + _GAP + lines * _LINE
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        left, top = _GAP + i % columns * wide, _GAP + i // columns * high
        picture = fitted(tile.picture, side)
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        for n, text in enumerate(tile.lines):
            pen.text((left, top + side + 1 + n * _LINE), _shortened(text, side, font), "black", font)
    return sheet


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """Scaled, up or down, so that its longer side is `side` pixels."""
    factor = side / max(picture.size)
    size = tuple(max(1, round(factor * length)) for length in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
