"""Pictures as people have them: read as upright 8-bit RGB, or looked into once to tell what they are."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Resampling, Transpose

from vislora.errors import DataError

THUMBNAIL, CHROMA = 12, 6  # pixels of a side, of its grey values and of its colours
_DRAFT = 96  # pixels that a JPEG keeps at least where only its thumbnail is wanted; with 24 copies are missed

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
FORMATS = {  # by the suffixes of pictures, as Pillow calls them; MPO is what phones write as .jpg
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".jfif": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".ppm": ("PPM",),
    ".pgm": ("PPM",),
    # what can't be decoded here, as HEIC where Pillow has no plug-in for it, is told by the look into every file
    ".avif": ("AVIF",),
    ".heic": ("HEIF",),
    ".heif": ("HEIF", "AVIF"),
    ".jp2": ("JPEG2000",),
}


class Place(NamedTuple):
    """Where the bytes of a picture are that lies in a larger file, which is no archive to be unpacked."""

    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Problem:
    """A file that needs a look: left out of the data set unless `usable`.

    Attributes:
        kinds: what is wrong or odd about it, in single words, as "damaged" or "rotated".
    """

    file: Path
    what: str
    usable: bool
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What decoding a file once has told.

    Attributes:
        problem: what is wrong or odd about it.
        width, height: pixels, upright; 0 where it can't be used.
        thumbnail: to know copies by, as `thumbnail` makes it; empty where the file can't be used.
    """

    problem: Problem | None
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""

    @property
    def usable(self) -> bool:
        return self.problem is None or self.problem.usable


def read_image(path: Path | str, place: Place | None = None) -> Image.Image:
    """A picture as `upright_rgb` makes it; where it lies in a larger file, `path` is but its name.

    Raises:
        DataError: the file is missing, empty, truncated, too large or no image.
    """
    with no_warnings(), _opened(Path(path), place) as picture:
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


def inspect(path: Path, place: Place | None = None) -> Facts:
    """Decode a picture, and tell what it is or why it can't be used.

    A JPEG is decoded to the end but at a reduced scale: its damage shows as well, in less time.
    """
    try:
        with _opened(path, place) as picture:
            size = picture.size
            picture.draft(None, (_DRAFT, _DRAFT))
            small = thumbnail(upright_rgb(picture))
            odd = dict(_oddities(picture, size, path.suffix.lower()))
            width, height = reversed(size) if _orientation(picture) in (5, 6, 7, 8) else size
    except _UnreadableError as reason:
        return Facts(Problem(path, str(reason), usable=False, kinds=(reason.kind,)))
    problem = Problem(path, ", ".join(odd.values()), usable=True, kinds=tuple(odd)) if odd else None
    return Facts(problem, width, height, small)


def thumbnail(picture: Image.Image) -> bytes:
    """An RGB picture squeezed to a square: its grey values [THUMBNAIL * THUMBNAIL], and more coarsely, as JPEG keeps
    them, how blue and how red it is [2 * CHROMA * CHROMA]."""
    grey, *colours = picture.convert("YCbCr").split()
    small = [grey.resize((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)]
    small += [colour.resize((CHROMA, CHROMA), Resampling.BOX) for colour in colours]
    return b"".join(band.tobytes() for band in small)


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """Scaled, up or down, so that its longer side is `side` pixels."""
    factor = side / max(picture.size)
    size = tuple(max(1, round(factor * length)) for length in picture.size)
    return picture.resize(size, Resampling.LANCZOS if factor < 1 else Resampling.BICUBIC)


class _UnreadableError(DataError):
    def __init__(self, what: str, kind: str = "damaged") -> None:  # torch makes it anew from its text, as pickle does
        super().__init__(what)
        self.kind = kind


@contextmanager
def _opened(path: Path, place: Place | None) -> Iterator[Image.Image]:
    """The picture as Pillow opens it; any error on the way, and in the block, is a DataError."""
    try:
        if (path.stat().st_size if place is None else place.size) == 0:
            raise _UnreadableError(f"{path} is empty", "empty")
        with Image.open(path if place is None else _read(place)) as picture:
            yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise _UnreadableError(f"{path} is missing", "missing") from None
    except Image.UnidentifiedImageError:
        raise _UnreadableError(f"{path} is no image, or of an unknown kind", "unknown") from None
    except Image.DecompressionBombError as error:
        what = f"{path} is too large to be decoded safely ({error}); scale it down"
        raise _UnreadableError(what, "huge") from None
    except Exception as error:  # Pillow's decoders raise many classes on malformed files, struct.error among them
        raise _UnreadableError(f"{path} can't be decoded: {error}") from None


def _read(place: Place) -> io.BytesIO:
    with place.file.open("rb") as file:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.size))


def _oddities(picture: Image.Image, size: tuple[int, int], suffix: str) -> Iterator[tuple[str, str]]:
    if suffix in FORMATS and picture.format not in FORMATS[suffix]:
        yield "suffix", f"a {picture.format} file, although its name ends in {suffix}"
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        yield "large", f"{size[0]} x {size[1]} pixels, slow to decode"
    try:
        # the further pictures of an MPO file are previews, or what a second lens saw
        if picture.format != "MPO" and (frames := getattr(picture, "n_frames", 1)) > 1:
            yield "animated", f"the first of {frames} frames is used"
    except Exception:  # as in `_opened`; what can't be counted won't be read either
        yield "animated", "damaged after the first frame, which is used"
    if picture.mode in _DEEP:
        yield "deep", "more than 8 bits per channel, scaled to 8"
    elif picture.has_transparency_data:
        yield "transparent", "transparent, composited on white"
    elif picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        yield "colours", f"{picture.mode} colours, converted to RGB"
    if _orientation(picture) in _UPRIGHT:
        yield "rotated", "turned upright as its EXIF orientation says"


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
def no_warnings() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata and large pictures to itself: what matters becomes a Problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
