"""Cached features come in the order, and mirrored as, the pictures of the same run would."""

import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from vislora.config.data import AugmentConfig
from vislora.config.training import PrefixCache
from vislora.data.features import compute_features
from vislora.data.order import Order, eval_loader, train_loader
from vislora.data.splits import ImageSplit, Pixels
from vislora.data.transforms import Preprocessing, eval_transform, train_transform
from vislora.errors import ConfigError, DataError

IMAGES = Preprocessing(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), crop_pct=0.9)


class Identity:
    """Features that are the pictures, so that they can be compared; counts what it is asked for."""

    shape, dtype = (3, 16, 16), torch.float32

    def __init__(self) -> None:
        self.pictures = 0

    def features(self, images: Tensor) -> Tensor:
        self.pictures += len(images)
        return images


@pytest.fixture
def split() -> ImageSplit:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3)).astype(np.uint8)
    return ImageSplit(("a", "b"), [i % 2 for i in range(40)], [str(i) for i in range(40)], Pixels(pixels))


def computed(split, prefix, where=PrefixCache.memory, flips=True, key="key"):
    transform = eval_transform(IMAGES)
    return compute_features(split, transform, flips, prefix, key, where, None, 0, Accelerator(cpu=True))


@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("where", [PrefixCache.memory, PrefixCache.disk])
def test_batches_are_those_of_the_training_loader(split, where, hflip):
    features = computed(split, Identity(), where, hflip > 0)
    augment = train_transform(IMAGES, AugmentConfig(hflip=hflip))
    for rank in (0, 1):
        order = Order(40, 12, seed=3, accumulation=2, rank=rank, world=2)
        wanted = list(train_loader(split, augment, order, 2, 9, 0))
        found = list(features.training(order, 2, 9, hflip))
        assert len(found) == len(wanted)
        for (mine, my_labels), (theirs, their_labels) in zip(found, wanted, strict=True):
            assert torch.equal(mine, theirs)
            assert torch.equal(my_labels, their_labels)


def test_drawing_the_flips_leaves_the_global_generator_alone(split):
    features, order = computed(split, Identity()), Order(40, 12, seed=3)
    before = torch.get_rng_state()
    list(features.training(order, 0, 4, 0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_batches_are_those_of_the_loader(split):
    features = computed(split, Identity())
    for rank in (0, 1):
        wanted = list(eval_loader(split, eval_transform(IMAGES), 7, 0, rank, 2))
        for (mine, my_labels), (theirs, their_labels, _) in zip(features.evaluation(7, rank, 2), wanted, strict=True):
            assert torch.equal(mine, theirs)
            assert torch.equal(my_labels, their_labels)


def test_a_file_is_found_again_until_a_picture_or_the_prefix_changes(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    first, second = Identity(), Identity()
    rows = computed(split, first, PrefixCache.disk).rows.clone()
    assert first.pictures == 80
    assert torch.equal(computed(split, second, PrefixCache.disk).rows, rows)
    assert second.pictures == 0
    computed(split, second, PrefixCache.disk, key="other weights")
    assert second.pictures == 80
    split.pictures.array[7, 12, 12, 2] ^= 64
    changed = computed(split, second, PrefixCache.disk).rows
    assert second.pictures == 160
    assert [i for i in range(40) if not torch.equal(changed[i], rows[i])] == [7]


def test_the_same_pictures_in_another_order_have_their_own_features(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    rows = computed(split, Identity(), PrefixCache.disk).rows.clone()
    split.pictures.array[:] = split.pictures.array[::-1].copy()
    assert torch.equal(computed(split, Identity(), PrefixCache.disk).rows, rows.flip(0))


def test_a_run_that_died_while_filling_leaves_no_file_behind(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))

    class Dies(Identity):
        def features(self, images):
            if self.pictures:
                raise KeyboardInterrupt
            return super().features(images)

    with pytest.raises(KeyboardInterrupt):
        computed(split, Dies(), PrefixCache.disk)
    assert not list((tmp_path / "prefix").iterdir())
    again = Identity()
    assert computed(split, again, PrefixCache.disk).rows[39].any()
    assert again.pictures == 80


def test_a_run_that_begins_while_another_fills_the_file_disturbs_neither(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    expected = computed(split, Identity()).rows
    found = []

    class Overtaken(Identity):
        def features(self, images):
            if self.pictures == 64:  # of 80: a batch and its mirror image
                found.append(computed(split, Identity(), PrefixCache.disk).rows)
            return super().features(images)

    found.append(computed(split, Overtaken(), PrefixCache.disk).rows)
    assert len(found) == 2
    assert all(torch.equal(rows, expected) for rows in found)
    assert len(list((tmp_path / "prefix").iterdir())) == 1


def test_a_file_of_the_cache_is_read_and_never_written_again(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    computed(split, Identity(), PrefixCache.disk).rows.zero_()
    assert computed(split, Identity(), PrefixCache.disk).rows.any()
    (file,) = (tmp_path / "prefix").iterdir()
    os.truncate(file, 1000)
    with pytest.raises(DataError, match=rf"{file.name} of the cache can't be read .*; delete it"):
        computed(split, Identity(), PrefixCache.disk)
    assert file.stat().st_size == 1000


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space")
def test_all_space_on_the_disk_is_taken_before_anything_is_computed(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))

    class Looks(Identity):
        def features(self, images):
            (part,) = (tmp_path / "prefix").glob("*.part")
            assert part.stat().st_blocks * 512 >= part.stat().st_size > 0
            return super().features(images)

    assert computed(split, Looks(), PrefixCache.disk).rows.any()


def test_a_full_disk_is_an_error_before_anything_is_computed(split, monkeypatch, tmp_path):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path))
    huge = Identity()
    huge.shape = (10**9, 10**6)
    with pytest.raises(ConfigError, match=r"[0-9.]+ GB are needed, .* in .*VISLORA_CACHE"):
        computed(split, huge, PrefixCache.disk)
    assert huge.pictures == 0
