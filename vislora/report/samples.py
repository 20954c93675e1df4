"""Pictures that a pipeline draws, and sheets of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

_CAPTION = 14  # pixels of a line of text


def draw_samples(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, size: int | None = None
) -> list[list[Image.Image]]:
    """A picture of each prompt, by seed: a list for each seed. A seed gives the same starting noise to every prompt."""
    rows = []
    for seed in seeds:
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        drawn = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            height=size,
            width=size,
        )
        rows.append(list(drawn.images))
    return rows


def save_grid(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], file: Path) -> None:
    """A sheet with a column for each caption; small pictures are enlarged."""
    width, height = rows[0][0].size
    factor = max(1, 160 // width)
    width, height = width * factor, height * factor
    sheet = Image.new("RGB", (len(captions) * (width + 4), len(rows) * (height + 4) + 3 * _CAPTION), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, caption in enumerate(captions):
        for row, images in enumerate(rows):
            picture = images[column].resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * (width + 4), row * (height + 4)))
        for line, text in enumerate(_wrapped(caption, width, font)[:3]):
            pen.text((column * (width + 4) + 1, len(rows) * (height + 4) + line * _CAPTION), text, "black", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    sheet.save(part, format="PNG")
    part.replace(file)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
