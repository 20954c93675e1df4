"""The drawn data set: its splits, its cache, its errors."""

import numpy as np
import pytest

from vislora.config import BirdsData
from vislora.data import drawn
from vislora.data.load import load_splits
from vislora.errors import DataError

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
