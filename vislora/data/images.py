"""Pictures as people have them, read as upright 8-bit RGB; and the check that names the ones that can't be."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vislora.errors import DataError
from vislora.files import write_json
from vislora.paths import cache_dir

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_LARGEST = 300_000_000  # pixels; a decoded picture of that size takes 0.9 GB


@dataclass(frozen=True)
class Problem:
    """A file that needs a look: left out of the data set unless `usable`."""

    file: Path
    what: str
    usable: bool


def read_image(path: Path) -> Image.Image:
    """A picture as RGB, turned upright as its EXIF orientation says.

    Transparency is composited on white; more than 8 bits per channel are scaled down; of an animation the first frame
    is taken.

    Raises:
        DataError: the file is missing, empty, truncated, too large or no image.
    """
    return _read(path)[0]


def check_images(paths: Sequence[Path]) -> list[Problem]:
    """Decode every file once, in parallel; name those that can't be used, and those that are used with a reservation.

    What was found is kept in the cache, by path, size and time of change, so that a file is decoded once.
    """
    store = cache_dir() / "checked.json"
    known: dict[str, str | None] = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    keys = [_fingerprint(path) for path in paths]
    fresh = [(key, path) for key, path in zip(keys, paths, strict=True) if key not in known]
    if fresh:
        with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:  # Pillow decodes outside the GIL
            verdicts = list(pool.map(_verdict, (path for _, path in fresh)))
        known |= {key: verdict for (key, _), verdict in zip(fresh, verdicts, strict=True)}
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, store)
    found = ((path, known[key]) for key, path in zip(keys, paths, strict=True))
    return [Problem(path, text.removeprefix("!"), not text.startswith("!")) for path, text in found if text]


def _fingerprint(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path.absolute()} missing"
    return f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"


def _verdict(path: Path) -> str | None:
    """None for a plain picture, "!reason" for one that can't be used, otherwise what is odd about it."""
    try:
        return ", ".join(_read(path)[1]) or None
    except DataError as error:
        return f"!{error}"


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """The picture as `read_image` returns it, and what is odd about the file."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > _LARGEST:
                raise DataError(f"{path} has {width} x {height} pixels, more than {_LARGEST:,}")
            odd = list(_oddities(picture))
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture)), odd
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many classes on malformed files, struct.error among them
        raise DataError(f"{path} can't be read as an image: {error}") from None


def _oddities(picture: Image.Image) -> Iterator[str]:
    if getattr(picture, "n_frames", 1) > 1:
        yield f"animated, the first of {picture.n_frames} frames is used"
    if picture.mode in _DEEP:
        yield "more than 8 bits per channel, scaled to 8"
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        yield f"{picture.mode} colours, converted to RGB"
    if picture.has_transparency_data:
        yield "transparent, composited on white"
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        yield "turned upright as its EXIF orientation says"


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _DEEP:
        return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale to [0, 255] from what the file can hold, where Pillow's own conversion clips: integers from [0, 65535],
    floats from [0, 1]; values beyond that from their own range."""
    full = 1.0 if np.issubdtype(values.dtype, np.floating) else 65535.0
    low, high = min(0.0, float(values.min())), max(full, float(values.max()))
    return np.round((values.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)
