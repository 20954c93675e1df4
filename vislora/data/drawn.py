"""The drawn birds as a data set: rendered once, kept in the cache."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from zlib import crc32

import numpy as np

import vislora.data.birds
from vislora.config import BirdsData
from vislora.data.birds import SPECIES, STYLES, Species, invented, picture
from vislora.data.order import mix
from vislora.data.splits import ImageSplit, Pixels, Splits
from vislora.errors import DataError
from vislora.paths import cache_dir

_POOL_FROM = 400  # pictures; fewer are drawn before a pool has started


def drawn_birds(config: BirdsData) -> Splits:
    """Draw train, val and test pictures of each species; the same settings give the same pixels.

    Raises:
        DataError: an unknown species or style, or fewer than two species.
    """
    species = _species(config)
    if config.style not in STYLES:
        raise DataError(f"data.style={config.style} is no drawing style; there are {', '.join(STYLES)}")
    counts = {"train": config.train_per_species, "val": config.val_per_species, "test": config.test_per_species}
    splits = {name: _split(name, count, species, config) if count else None for name, count in counts.items()}
    if splits["train"] is None:
        raise DataError("data.train_per_species=0: there is nothing to train on")
    return Splits(**splits)


def _species(config: BirdsData) -> list[Species]:
    if config.invented:
        return [invented(index) for index in range(config.invented)]
    names = config.species if config.species is not None else list(SPECIES)
    for name in names:
        if name not in SPECIES:
            near = get_close_matches(name, SPECIES, n=3)
            raise DataError(
                f"no drawn species {name!r}; "
                + (f"close: {', '.join(near)}" if near else f"there are {', '.join(SPECIES)}")
            )
    if len(names) < 2:
        raise DataError("data.species: at least two are needed to tell them apart")
    return [SPECIES[name] for name in names]


def _split(name: str, count: int, species: list[Species], config: BirdsData) -> ImageSplit:
    # the same key draws the same picture; train, val and test never share one
    start = mix(config.seed, crc32(name.encode()))
    jobs = [
        (kind, (start + i) % 2**63, config.difficulty, config.style, config.size)
        for kind in species
        for i in range(count)
    ]
    labels = [k for k in range(len(species)) for _ in range(count)]
    names = [f"{name}/{kind.name}/{i:04d}" for kind in species for i in range(count)]
    return ImageSplit(tuple(kind.name for kind in species), labels, names, Pixels(_render(jobs)))


def _render(jobs: list[tuple]) -> np.ndarray:
    """Pictures uint8 [N, size, size, 3], from the cache where they have been drawn before."""
    key = json.dumps([[job[0].name, *job[1:]] for job in jobs]) + _renderer_version()
    path = cache_dir() / "birds" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if len(jobs) < _POOL_FROM or os.cpu_count() == 1:
        pixels = np.stack([_draw(job) for job in jobs])
    else:
        with ProcessPoolExecutor() as pool:
            pixels = np.stack(list(pool.map(_draw, jobs, chunksize=32)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, pixels)
    os.replace(part, path)
    return pixels


def _draw(job: tuple) -> np.ndarray:
    return np.asarray(picture(*job))


def _renderer_version() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(vislora.data.birds.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
