"""Files looked into: at a reduced scale without missing damage, in parallel, and kept line by line."""

import io
import os
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from vislora.data import inspection
from vislora.data.images import inspect, read_image
from vislora.data.inspection import inspect_files
from vislora.errors import DataError
from vislora.paths import cache_dir

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))


def scene(width=400, height=300, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"mode": "CMYK"}])
def test_damage_to_a_jpeg_shows_at_a_reduced_scale_exactly_where_it_shows_at_full_scale(tmp_path, options):
    dice, options = random.Random(0), dict(options)
    noisy = Image.fromarray(np.asarray(scene()) // 2 + RNG.integers(0, 60, (300, 400, 3), dtype=np.uint8))
    buffer, path, unusable = io.BytesIO(), tmp_path / "a.jpg", 0
    noisy.convert(options.pop("mode", "RGB")).save(buffer, "JPEG", **options)
    for i in range(60):
        data = bytearray(buffer.getvalue())
        if i % 2:
            data = data[: dice.randrange(len(data))]
        else:
            for _ in range(dice.randrange(1, 8)):
                data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = inspect(path)
        try:
            read_image(path)
            assert facts.usable
        except DataError:
            assert not facts.usable
            unusable += 1
    assert unusable >= 25


def test_sizes_are_told_upright_and_thumbnails_do_not_hang_on_the_way_a_picture_is_stored(tmp_path):
    upright, exif = scene(), Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=exif, quality=95)
    a, b = inspect(tmp_path / "a.png"), inspect(tmp_path / "b.jpg")
    assert (a.width, a.height) == (b.width, b.height) == (400, 300)
    difference = np.frombuffer(a.thumbnail, np.uint8).astype(int) - np.frombuffer(b.thumbnail, np.uint8)
    assert np.abs(difference).max() <= 4


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i:03d}.png" for i in range(100)]
    for i, path in enumerate(paths):
        scene(20, 20, i).save(path)

    def stopped(path, place):
        if path == paths[80]:
            raise KeyboardInterrupt
        return inspect(path, place)

    monkeypatch.setattr(inspection, "inspect", stopped)
    with pytest.raises(KeyboardInterrupt):
        inspect_files(paths)
    opened = []
    monkeypatch.setattr(inspection, "inspect", lambda path, place: opened.append(path) or inspect(path, place))
    found = inspect_files(paths)
    assert set(opened) == set(paths[64:])  # the first two batches of 32 were done
    assert list(found) == paths
    assert all(facts.usable and facts.width == 20 for facts in found.values())
    inspect_files(paths)
    assert len(opened) == 100 - 64


def test_a_line_cut_short_costs_no_other_line(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        scene(20, 20).save(tmp_path / name)
    inspect_files([tmp_path / "a.png", tmp_path / "b.png"])
    (store,) = (cache_dir() / "inspected").iterdir()
    store.write_text(store.read_text()[:-30])
    inspect_files([tmp_path / "c.png"])
    for name in ("a.png", "c.png"):  # known by now: what is in them isn't looked at
        state = (tmp_path / name).stat()
        (tmp_path / name).write_bytes(bytes(state.st_size))
        os.utime(tmp_path / name, ns=(state.st_atime_ns, state.st_mtime_ns))
    found = inspect_files([tmp_path / name for name in ("a.png", "b.png", "c.png")])
    assert all(facts.usable for facts in found.values())


def test_processes_find_what_threads_find(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.jpg" for i in range(70)]
    for i, path in enumerate(paths):
        scene(60, 50, i).convert("CMYK" if i % 7 == 0 else "RGB").save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:500])
    threads = inspect_files(paths)
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(inspection, "_PROCESSES_FROM", 10)
    assert inspect_files(paths) == threads
    assert not threads[paths[3]].usable


def test_a_name_that_is_no_utf_8_is_kept_too(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    scene(20, 20).save(path)
    assert inspect_files([path]) == inspect_files([path])
    assert len(list((cache_dir() / "inspected").iterdir())) == 1
