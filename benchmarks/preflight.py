"""python benchmarks/preflight.py [--images 20000] [--rounds 3] [--keep FOLDER]

What looking a folder of pictures through costs beside decoding it: files/s of a pool that does nothing but decode each
file to RGB on all cores, and of the preflight, which decodes, finds faults and looks for copies; interleaved, each
preflight with an empty cache. The files are in the page cache for both.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from vislora.compose import configure
from vislora.preflight import preflight

CLASSES = 20


def draw(job: tuple[Path, int]) -> None:
    """A JPEG of coloured gradients and noise, 256 to 512 pixels wide and high."""
    path, seed = job
    rng = np.random.default_rng(seed)
    width, height = rng.integers(256, 513, 2).tolist()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)).resize((width, height))
    Image.blend(coarse, noise, 0.15).save(path, quality=int(rng.integers(75, 95)))


def decode(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.convert("RGB").size[0]


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))


def plain(paths: list[Path]) -> float:
    start = time.perf_counter()
    with pool() as workers:
        assert sum(workers.map(decode, paths, chunksize=32)) > 0
    return time.perf_counter() - start


def looked_through(root: Path) -> tuple[float, float]:
    """Seconds of a preflight with an empty cache, and of the next one."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VISLORA_CACHE"] = cache
        config = configure("preflight", ["data=imagefolder", f"data.root={root}"])
        times = []
        for _ in range(2):
            start = time.perf_counter()
            assert preflight(config).usable
            times.append(time.perf_counter() - start)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a folder for the pictures, used again if it is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder)
        paths = [root / f"class {i % CLASSES:02d}" / f"{i:06d}.jpg" for i in range(arguments.images)]
        if not paths[-1].is_file():
            for path in paths[:CLASSES]:
                path.parent.mkdir(parents=True, exist_ok=True)
            with pool() as workers:
                list(workers.map(draw, zip(paths, range(len(paths)), strict=True), chunksize=32))
        rows = [(plain(paths), *looked_through(root)) for _ in range(arguments.rounds)]
    print(f"{arguments.images:,} JPEGs, {os.cpu_count()} cores, {platform.machine()}, {date.today()}")
    for name, column in (("plain decoding", 0), ("preflight", 1), ("preflight again, cached", 2)):
        seconds = statistics.median(row[column] for row in rows)
        print(f"{name:24} {seconds:7.1f} s {arguments.images / seconds:8.0f} files/s")
    ratios = [row[0] / row[1] for row in rows]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"preflight runs at {statistics.median(ratios):.2f} times the speed of plain decoding ({spread})")


if __name__ == "__main__":
    main()
