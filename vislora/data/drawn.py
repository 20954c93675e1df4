"""The drawn birds as a data set: rendered once, kept in the cache."""

import hashlib
import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from zlib import crc32

import numpy as np
from joblib import Parallel, delayed
from numpy.lib.format import open_memmap
from PIL import Image
from tqdm import tqdm

import vislora.data.birds
from vislora.config.data import BirdsCaptionsData, BirdsData
from vislora.data.birds import SPECIES, STYLES, Species, caption, invented, picture, seeded_scene
from vislora.data.captions import Captioned, CaptionedSplits
from vislora.data.order import mix
from vislora.data.splits import ImageSplit, Pixels, Splits
from vislora.errors import DataError
from vislora.files import replacing, reserve
from vislora.paths import cache_dir

_POOL_FROM = 200  # pictures; fewer are drawn before a pool has started

_Job = tuple[Species, int, float, str, int]  # the arguments of `picture`


def drawn_birds(config: BirdsData) -> Splits:
    """Draw train, val and test pictures of each species; the same settings give the same pixels.

    Raises:
        DataError: an unknown species or style.
    """
    species = _species(config)
    _check_style(config.style)
    counts = {"train": config.train_per_species, "val": config.val_per_species, "test": config.test_per_species}
    splits = {name: _split(name, count, species, config) if count else None for name, count in counts.items()}
    return Splits(**splits)


def drawn_captions(config: BirdsCaptionsData) -> CaptionedSplits:
    """Draw captioned pictures, one species after the other; none to learn from is among those to validate on.

    Raises:
        DataError: an unknown species or style.
    """
    species = _named(config.species)
    _check_style(config.style)
    val = _captioned("val", config.val_count, species, config) if config.val_count else None
    return CaptionedSplits(_captioned("train", config.count, species, config), val)


def drawing_seeds(seed: int, split: str, count: int) -> list[int]:
    """The numbers of a split's pictures of any one species, as `vislora.data.birds.picture` takes them.

    The same number draws the same picture; train, val and test never share one.
    """
    start = mix(seed, crc32(split.encode()))
    return [(start + i) % 2**63 for i in range(count)]


def _species(config: BirdsData) -> list[Species]:
    if config.invented:
        return [invented(index) for index in range(config.invented)]
    return _named(config.species)


def _named(names: list[str] | None) -> list[Species]:
    names = names if names is not None else list(SPECIES)
    if not names:
        raise DataError("data.species=[] names no species to draw")
    for name in names:
        if name not in SPECIES:
            near = get_close_matches(name, SPECIES, n=3)
            hint = f"close: {', '.join(near)}" if near else f"there are {', '.join(SPECIES)}"
            raise DataError(f"data.species: no drawn species {name!r}; {hint}")
    return [SPECIES[name] for name in names]


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise DataError(f"data.style={style} is no drawing style; there are {', '.join(STYLES)}")


def _captioned(name: str, count: int, species: list[Species], config: BirdsCaptionsData) -> Captioned:
    rounds = drawing_seeds(config.seed, name, -(-count // len(species)))
    drawn = [(kind, seed) for seed in rounds for kind in species][:count]
    captions = [f"{config.prefix}{caption(kind, seeded_scene(kind, seed, config.difficulty))}" for kind, seed in drawn]
    names = [f"{name}/{i:04d} {kind.name}" for i, (kind, _) in enumerate(drawn)]
    jobs = [(kind, seed, config.difficulty, config.style, config.drawn_size) for kind, seed in drawn]
    return Captioned(captions, names, Pixels(_render(jobs)))


def _split(name: str, count: int, species: list[Species], config: BirdsData) -> ImageSplit:
    jobs = [
        (kind, seed, config.difficulty, config.style, config.size)
        for kind in species
        for seed in drawing_seeds(config.seed, name, count)
    ]
    labels = [k for k in range(len(species)) for _ in range(count)]
    names = [f"{name}/{kind.name}/{i:04d}" for kind in species for i in range(count)]
    return ImageSplit(tuple(kind.name for kind in species), labels, names, Pixels(_render(jobs)))


def _render(jobs: list[_Job]) -> np.ndarray:
    """Pictures uint8 [N, size, size, 3], in a file of the cache; drawn unless they are there already."""
    key = json.dumps([[job[0].name, *job[1:]] for job in jobs]) + _renderer_version()
    path = cache_dir() / "birds" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        size = jobs[0][-1]
        with replacing(path) as part:
            pixels = open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(jobs), size, size, 3))
            reserve(part, part.stat().st_size)
            for i, drawing in enumerate(_drawings(jobs)):
                pixels[i] = drawing
            pixels.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _drawings(jobs: list[_Job]) -> Iterator[Image.Image]:
    """The pictures in order, drawn by all cores where there are many."""
    # joblib's processes, unlike multiprocessing's, don't run the user's script once more, and serve the next split too
    pool = Parallel(-1 if len(jobs) >= _POOL_FROM else 1, batch_size=32, return_as="generator")
    drawings = pool(delayed(picture)(*job) for job in jobs)
    yield from tqdm(drawings, "drawing birds", len(jobs), unit="", delay=2, leave=False, disable=None)


def _renderer_version() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(vislora.data.birds.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
