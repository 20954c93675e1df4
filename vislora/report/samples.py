"""Sheets of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vislora.files import replacing
from vislora.report.sheets import FONT

_CAPTION = 14  # pixels of a line of text


def save_grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], file: Path) -> None:
    """A sheet with a column for each caption; small pictures are enlarged."""
    width, height = rows[0][0].size
    factor = max(1, 160 // width)
    width, height = width * factor, height * factor
    sheet = Image.new("RGB", (len(captions) * (width + 4), len(rows) * (height + 4) + 3 * _CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 11)
    for column, caption in enumerate(captions):
        for row, images in enumerate(rows):
            picture = images[column].resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * (width + 4), row * (height + 4)))
        for line, text in enumerate(_wrapped(caption, width, font)[:3]):
            pen.text((column * (width + 4) + 1, len(rows) * (height + 4) + line * _CAPTION), text, "black", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        sheet.save(part, format="PNG")


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
