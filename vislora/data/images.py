"""Pictures as people have them, read as upright 8-bit RGB; and the check that names the ones that can't be."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import ExifTags, Image
from PIL.Image import Transpose
from tqdm import tqdm

from vislora.errors import DataError
from vislora.files import write_json
from vislora.paths import cache_dir

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_UPRIGHT = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Problem:
    """A file that needs a look: left out of the data set unless `usable`."""

    file: Path
    what: str
    usable: bool


def read_image(path: Path) -> Image.Image:
    """A picture as `upright_rgb` makes it.

    Raises:
        DataError: the file is missing, empty, truncated, too large or no image.
    """
    with _no_warnings(), _opened(path) as picture:
        return upright_rgb(picture)


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is composited on white; more than 8 bits per channel are scaled down; of several frames the current
    one is taken.
    """
    picture.load()
    if (turn := _UPRIGHT.get(_orientation(picture))) is not None:
        picture = picture.transpose(turn)
    if picture.mode in _DEEP:
        rgb = Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    else:
        rgb = picture.convert("RGB")
    rgb.info = {}  # or whoever reads the orientation there would turn it once more
    return rgb


def check_images(paths: Sequence[Path]) -> list[Problem]:
    """Decode every file once, in parallel; name those that can't be used, and those that are used with a reservation.

    What was found about usable files is kept in the cache, one list for each folder, and holds while their size and
    time of change do. Unusable ones are tried again each time: a disk or a permission may have been the cause.
    """
    folders: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        folders.setdefault(path.absolute().parent, []).append(path)
    problems: dict[Path, Problem] = {}
    threads = min(8, (os.cpu_count() or 1) + 1)  # Pillow decodes without holding the interpreter's lock
    bar = tqdm(total=len(paths), desc="checking images", unit="", delay=2, leave=False, disable=None)
    with _no_warnings(), bar, ThreadPoolExecutor(threads) as pool:
        for folder, files in folders.items():
            problems |= {problem.file: problem for problem in _check_folder(folder, files, pool)}
            bar.update(len(files))
    return [problems[path] for path in dict.fromkeys(paths) if path in problems]


def _check_folder(folder: Path, files: list[Path], pool: ThreadPoolExecutor) -> Iterator[Problem]:
    # what is odd, and what can be decoded, depends on Pillow, hence its version
    key = hashlib.sha256(f"{folder} {PIL.__version__}".encode()).hexdigest()[:24]
    store = cache_dir() / "checked" / f"{key}.json"
    known = _read_store(store)
    states = {path: _state(path) for path in files}
    fresh = [path for path, state in states.items() if state is None or known.get(path.name, {}).get("state") != state]
    found = dict(zip(fresh, pool.map(_inspect, fresh), strict=True))
    usable = {path.name: {"state": states[path], "odd": odd} for path, odd in found.items() if isinstance(odd, str)}
    if usable:
        known |= usable
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, store)
    for path in files:
        if isinstance(reason := found.get(path), DataError):
            yield Problem(path, str(reason), usable=False)
        elif odd := known[path.name]["odd"]:
            yield Problem(path, odd, usable=True)


def _read_store(store: Path) -> dict[str, dict]:
    try:
        return json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or damaged: the files are decoded again
        return {}


def _state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _inspect(path: Path) -> str | DataError:
    """What is odd about a usable file, "" for nothing; or why it can't be used."""
    try:
        with _opened(path) as picture:
            upright_rgb(picture)
            return ", ".join(_oddities(picture))
    except DataError as reason:
        return reason


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow opens it; any error on the way, and in the block, is a DataError."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        with Image.open(path) as picture:
            yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path} is no image, or of an unknown kind") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large to be decoded safely ({error}); scale it down") from None
    except Exception as error:  # Pillow's decoders raise many classes on malformed files, struct.error among them
        raise DataError(f"{path} can't be decoded: {error}") from None


def _oddities(picture: Image.Image) -> Iterator[str]:
    try:
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            yield f"the first of {frames} frames is used"
    except Exception:  # as in `_opened`; what can't be counted won't be read either
        yield "damaged after the first frame, which is used"
    if picture.mode in _DEEP:
        yield "more than 8 bits per channel, scaled to 8"
    elif picture.has_transparency_data:
        yield "transparent, composited on white"
    elif picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        yield f"{picture.mode} colours, converted to RGB"
    if _orientation(picture) in _UPRIGHT:
        yield "turned upright as its EXIF orientation says"


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed metadata says nothing against the pixels, and Pillow raises many classes on it
        return 1


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale to [0, 255] from what the file can hold, where Pillow's own conversion clips: integers from [0, 65535],
    floats from [0, 1]; values beyond that from their own range."""
    full = 1.0 if np.issubdtype(values.dtype, np.floating) else 65535.0
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = min(0.0, values.min()), max(full, values.max())
    return np.round((values - low) / (high - low) * 255).astype(np.uint8)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata and large pictures to itself: what matters becomes a Problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
