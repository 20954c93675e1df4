"""Corruptions: stronger is worse, and the same seed is the same picture."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from vislora.config.commands import Corruption
from vislora.data.corruptions import STRENGTHS, corrupt, corrupted
from vislora.data.splits import ImageSplit, Pixels
from vislora.data.transforms import Preprocessing


@pytest.fixture(scope="module")
def picture():
    """Spots of all sizes, as photos have them, 64 x 64."""
    rng = np.random.default_rng(0)
    pixels = np.full((64, 64, 3), 110.0)
    for side in (4, 8, 16, 32, 64):
        spots = Image.fromarray((rng.random((side, side, 3)) * 255).astype(np.uint8)).resize((64, 64))
        pixels += (np.asarray(spots, float) - 128) * 0.3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", list(Corruption))
def test_each_strength_is_further_from_the_picture_than_the_one_before(picture, kind):
    distances = []
    for strength in range(1, STRENGTHS + 1):
        spoiled = corrupt(picture, kind, strength, seed=3)
        assert (spoiled.size, spoiled.mode) == (picture.size, "RGB")
        distances.append(np.square(np.asarray(spoiled, float) - np.asarray(picture, float)).mean())
    assert distances[0] > 1
    # pixels that happen to fall on a picture's own edges make a step or two small
    assert all(later > 0.98 * earlier for earlier, later in pairwise(distances))
    assert distances[-1] > 1.2 * distances[0]


def test_noise_has_the_strength_it_says_and_hangs_on_the_seed():
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    noisy = np.asarray(corrupt(grey, Corruption.noise, 1, seed=0), float) / 255
    assert noisy.std() == pytest.approx(0.08, rel=0.02)
    assert np.array_equal(np.asarray(corrupt(grey, Corruption.noise, 1, seed=0), float) / 255, noisy)
    assert not np.array_equal(np.asarray(corrupt(grey, Corruption.noise, 1, seed=1), float) / 255, noisy)


@pytest.mark.parametrize("size", [56, 224])
def test_blur_is_as_wide_as_it_says_at_224_pixels_and_by_the_root_of_the_size_elsewhere(size):
    line = Image.new("L", (size, size))
    line.paste(255, (size // 2, 0, size // 2 + 1, size))
    row = np.asarray(corrupt(line.convert("RGB"), Corruption.blur, 1, seed=0), float)[size // 2, :, 0]
    variance = size / 224  # of the mildest, whose sigma is 1
    assert row[size // 2 + 1] / row[size // 2] == pytest.approx(np.exp(-1 / (2 * variance)), rel=0.03)


def test_a_split_is_spoiled_at_the_size_the_model_sees():
    split = ImageSplit(("a", "b"), [0, 1], ["x", "y"], Pixels(np.full((2, 90, 60, 3), 128, np.uint8)))
    spoiled = corrupted(split, Corruption.noise, 2, Preprocessing(32, (0.5,) * 3, (0.5,) * 3, crop_pct=0.8))
    first, second = (np.asarray(spoiled.image(i), float) for i in (0, 1))
    assert first.shape == (32, 32, 3)
    assert first.std() / 255 == pytest.approx(0.12, rel=0.05)  # not averaged away by resizing
    assert not np.array_equal(first, second)
    assert spoiled.labels == split.labels
