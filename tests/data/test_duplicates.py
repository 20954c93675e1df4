"""Copies are found after scaling and compression; different drawings of a kind are not taken for copies."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from vislora.data import duplicates
from vislora.data.birds import SPECIES, picture
from vislora.data.duplicates import among, copies, near_pairs, perceptual_hashes
from vislora.data.images import CHROMA, THUMBNAIL, thumbnail


def all_near(hashes, bits):
    pairs = np.concatenate([np.empty((0, 2), int), *near_pairs(np.array(hashes, np.uint64), bits)])
    return np.unique(pairs, axis=0).tolist()


def again(image, quality, scale):
    """The picture scaled and compressed."""
    size = [round(side * scale) for side in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("bits", [0, 3, 6])
def test_all_pairs_within_the_distance_are_found_and_no_other(bits):
    rng, dice = np.random.default_rng(0), random.Random(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64).tolist()
    for _ in range(300):  # neighbours at any distance around the bound
        flipped = dice.choice(hashes[:400])
        for bit in dice.sample(range(64), dice.randrange(10)):
            flipped ^= 1 << bit
        hashes.append(flipped)
    expected = [[i, j] for i in range(700) for j in range(i + 1, 700) if (hashes[i] ^ hashes[j]).bit_count() <= bits]
    assert all_near(hashes, bits) == expected
    assert len(expected) > 5


def test_hashes_that_fall_into_one_band_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr("vislora.data.duplicates._COMPARED", 420)
    hashes = [1 << (i % 40) for i in range(60)]
    assert len(all_near(hashes, 2)) == 60 * 59 // 2
    assert len(all_near(hashes, 1)) == 20


def test_a_hash_is_the_sign_of_the_dct_against_its_median():
    from scipy.fft import dctn

    grey = np.random.default_rng(1).integers(0, 256, (THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    low = dctn(grey.astype(float), norm="ortho")[:8, :8]
    low[0] *= np.sqrt(2)  # the orthonormal form scales the first row and column
    low[:, 0] *= np.sqrt(2)
    expected = (low.ravel() > np.median(low.ravel()[1:])).astype(np.uint8)
    (found,) = perceptual_hashes(grey.reshape(1, -1))
    assert np.array_equal(np.unpackbits(np.array([found]).view(np.uint8)), expected)


@pytest.mark.parametrize("species", ["american robin", "blue jay", "great egret"])
def test_drawings_of_one_species_on_a_plain_ground_are_no_copies(species):
    drawings = [thumbnail(picture(SPECIES[species], seed, 0.0, "natural", 64)) for seed in range(120)]
    hashes = perceptual_hashes(np.frombuffer(b"".join(drawings), np.uint8).reshape(120, -1)[:, : THUMBNAIL**2])
    assert len(all_near(hashes, 6)) > 5  # by their hashes alone some would be
    assert copies(drawings) == []


@pytest.mark.parametrize(("quality", "scale"), [(90, 1), (75, 1), (40, 1), (85, 0.5), (85, 2), (70, 0.75), (60, 1.5)])
def test_scaled_and_compressed_copies_are_found(quality, scale):
    names = ("mallard", "barn owl", "american robin", "great egret")
    drawings = [picture(SPECIES[name], seed, 0.2, "natural", 160) for name in names for seed in range(5)]
    thumbnails = [thumbnail(d) for d in drawings] + [thumbnail(again(d, quality, scale)) for d in drawings]
    assert sorted(copies(thumbnails)) == [[i, i + 20] for i in range(20)]


def test_copies_of_known_pictures_are_told_from_copies_among_themselves():
    drawings = [picture(SPECIES["mallard"], seed, 0.2, "natural", 160) for seed in range(6)]
    known = [thumbnail(d) for d in drawings[:3]]
    others = [thumbnail(d) for d in (drawings[4], again(drawings[1], 75, 0.5), drawings[5], drawings[4], drawings[1])]
    assert among(others, known) == [1, 4]
    assert among(known, []) == among([], known) == []


@pytest.mark.parametrize("degrees", [30, 60, 120, 180])
def test_pictures_that_differ_in_colour_alone_are_no_copies(degrees):
    def recoloured(image):
        hue, *rest = image.convert("HSV").split()
        turned = hue.point(lambda level: round(level + degrees * 256 / 360) % 256)
        return Image.merge("HSV", (turned, *rest)).convert("RGB")

    drawings = [picture(SPECIES[name], 0, 0.2, "natural", 160) for name in SPECIES]
    pairs = [[drawing, recoloured(drawing)] for drawing in drawings]
    # of the same brightness, as turned hues are not
    pairs += [
        [one, Image.merge("YCbCr", (one.convert("L"), *other.convert("YCbCr").split()[1:]))] for one, other in pairs
    ]
    assert [copies([thumbnail(image.convert("RGB")) for image in pair]) for pair in pairs] == [[]] * len(pairs)


def test_several_copies_are_one_group_and_blank_pictures_go_by_their_grey():
    drawing = picture(SPECIES["mallard"], 1, 0.2, "natural", 160)
    blank = [Image.new("RGB", (50, 50), (grey,) * 3) for grey in (0, 255, 0, 128)]
    images = [drawing, blank[0], again(drawing, 80, 0.5), blank[1], again(drawing, 60, 1), blank[2], blank[3]]
    assert sorted(copies([thumbnail(image) for image in images])) == [[0, 2, 4], [1, 5]]
    assert copies([]) == []


def test_pictures_of_a_camera_that_stands_still_are_one_group_by_few_comparisons(monkeypatch):
    rng, compared = np.random.default_rng(0), []
    scene = rng.uniform(20, 235, THUMBNAIL**2 + 2 * CHROMA**2)
    frames = [bytes((scene + rng.normal(0, 1, scene.size)).round().astype(np.uint8)) for _ in range(2000)]
    of_pairs = duplicates._differences
    monkeypatch.setattr(duplicates, "_differences", lambda *given: compared.append(len(given[1])) or of_pairs(*given))
    assert copies(frames) == [list(range(2000))]
    assert sum(compared) < 2000 * 1999 // 2 / 10
