"""The drawn data set: its splits, its cache, its errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vislora.config.data import BirdsData
from vislora.data import drawn
from vislora.data.birds import SPECIES, picture
from vislora.data.load import load_splits
from vislora.errors import ConfigError, DataError

SMALL = {"species": ["mallard", "barn owl"], "train_per_species": 4, "val_per_species": 0, "test_per_species": 3}


def pixels(split):
    return np.stack([np.asarray(split.image(i)) for i in range(len(split))])


def test_splits_hold_different_pictures_of_the_same_species():
    splits = load_splits(BirdsData(**SMALL), 0)
    assert splits.classes == ("mallard", "barn owl")
    assert splits.train.labels == [0] * 4 + [1] * 4
    assert (splits.val, len(splits.test)) == (None, 6)
    seen = [picture.tobytes() for split in (splits.train, splits.test) for picture in pixels(split)]
    assert len(set(seen)) == 14
    # a cap of green and a white face: the labels belong to the pictures
    assert splits.train.names[0].startswith("train/mallard")


def test_the_same_settings_give_the_same_pixels_with_and_without_the_cache(tmp_path, monkeypatch):
    first = pixels(load_splits(BirdsData(**SMALL), 0).train)
    again = pixels(load_splits(BirdsData(**SMALL), 0).train)
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    anew = pixels(load_splits(BirdsData(**SMALL), 0).train)
    assert np.array_equal(first, again)
    assert np.array_equal(first, anew)
    other = pixels(load_splits(BirdsData(**SMALL, seed=1), 0).train)
    assert not np.array_equal(first, other)


def test_a_pool_of_processes_draws_the_same_pictures(tmp_path, monkeypatch):
    alone = pixels(load_splits(BirdsData(**SMALL), 0).train)
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(drawn, "_POOL_FROM", 1)
    assert np.array_equal(pixels(load_splits(BirdsData(**SMALL), 0).train), alone)


def test_invented_species_are_drawn_in_their_stead():
    splits = load_splits(BirdsData(invented=3, train_per_species=2, val_per_species=1, test_per_species=0), 0)
    assert splits.classes == ("invented 0000", "invented 0001", "invented 0002")
    assert splits.test is None


def test_unknown_species_and_styles_are_answered_with_what_there_is():
    with pytest.raises(DataError, match="no drawn species 'barn own'; close: barn owl"):
        load_splits(BirdsData(species=["mallard", "barn own"]), 0)
    with pytest.raises(DataError, match="natural, flat, ink"):
        load_splits(BirdsData(species=["mallard", "barn owl"], style="oil"), 0)
    with pytest.raises(DataError, match="at least two"):
        load_splits(BirdsData(species=["mallard"]), 0)


def test_a_picture_depends_on_its_own_key_alone():
    few = load_splits(BirdsData(**SMALL), 0)
    more = load_splits(
        BirdsData(**SMALL | {"species": ["barn owl", "mallard", "great egret"], "train_per_species": 6}), 0
    )
    for name in few.train.names:
        one, other = few.train.image(few.train.names.index(name)), more.train.image(more.train.names.index(name))
        assert one.tobytes() == other.tobytes()


def test_size_style_and_difficulty_are_those_asked_for():
    settings = BirdsData(**SMALL, size=32, style="ink", difficulty=0.0)
    split = load_splits(settings, 0).train
    seed = drawn.mix(0, drawn.crc32(b"train")) + 1
    assert split.image(1).tobytes() == picture(SPECIES["mallard"], seed, 0.0, "ink", 32).tobytes()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"difficulty": 1.5}, "difficulty=1.5: expected 0 to 1"),
        ({"size": 16}, "size=16: expected 32 to 512"),
        ({"train_per_species": 0}, "train_per_species=0: expected 1 or more"),
        ({"test_per_species": -1}, "test_per_species=-1: expected 0 or more"),
        ({"invented": -1}, "invented=-1: expected 0 or more"),
        ({"invented": 2, "species": ["mallard"]}, "data.invented draws others instead; leave one of them out"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        BirdsData(**SMALL | setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"style": "oil"}, "data.style=oil is no drawing style; there are natural"),
        ({"species": []}, "names no species to draw"),
        ({"species": ["great egret", "great egret"]}, "two classes of the data are called 'great egret'"),
    ],
)
def test_species_and_styles_that_can_not_be_drawn_are_refused(setting, message):
    with pytest.raises(DataError, match=message):
        load_splits(BirdsData(**SMALL | setting), 0)


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))

    def interrupted(_):
        yield picture(SPECIES["great egret"], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "_drawings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_splits(BirdsData(**SMALL), 0)
    assert list((tmp_path / "birds").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_all_space_on_the_disk_is_taken_before_the_first_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))

    def drawings(_):
        (part,) = (tmp_path / "birds").iterdir()
        assert part.stat().st_blocks * 512 >= part.stat().st_size
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "_drawings", drawings)
    with pytest.raises(KeyboardInterrupt):
        load_splits(BirdsData(**SMALL), 0)


def test_a_script_without_a_guard_is_not_run_again_by_the_processes_that_draw(tmp_path):
    script = tmp_path / "script.py"  # no `if __name__ == "__main__":`
    script.write_text(
        "from vislora.config.data import BirdsData\n"
        "from vislora.data import drawn\n"
        "drawn._POOL_FROM = 1\n"
        f"print(len(drawn.drawn_birds(BirdsData(**{SMALL})).test))\n"
    )
    root = Path(drawn.__file__).parents[2]
    env = os.environ | {"VISLORA_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("6\n", "")
