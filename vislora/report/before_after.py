"""Pairs of pictures for the report's sliders: the same prompt and noise without and with an adapter."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vislora.files import write_json

FOLDER = "before_after"


def write_pairs(
    captions: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image], folder: Path
) -> None:
    """Write before_after/NAME.before.png and NAME.after.png below `folder`, and captions.json, which tells what each
    name stands for."""
    names = [f"{i + 1:02d}_{file_name(caption)}" for i, caption in enumerate(captions)]
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, *pair in zip(names, before, after, strict=True):
        for which, picture in zip(("before", "after"), pair, strict=True):
            picture.save(folder / FOLDER / f"{name}.{which}.png")
    write_json(dict(zip(names, captions, strict=True)), folder / FOLDER / "captions.json")


def file_name(text: str) -> str:
    """A text as the name of a file or folder that any system takes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")[:60]
