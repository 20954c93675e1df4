"""Splits: what is held out, and what a picture that can't be decoded says."""

import numpy as np
import pytest

from vislora.data.splits import ImageSplit, Pixels, hold_out
from vislora.errors import DataError

COUNTS = {"a": 40, "b": 11, "c": 2, "d": 1}


def split(order=None):
    """One pixel a picture, whose value is its number."""
    rows = [(k, f"{name}/{i:02d}") for k, (name, count) in enumerate(COUNTS.items()) for i in range(count)]
    numbers = list(range(len(rows))) if order is None else list(order)
    pixels = np.array(numbers, np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    return ImageSplit(tuple(COUNTS), [rows[n][0] for n in numbers], [rows[n][1] for n in numbers], Pixels(pixels))


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, [4, 1, 1, 0]), (0.5, [20, 6, 1, 0]), (0.99, [39, 10, 1, 0])])
def test_each_class_gives_its_share_and_keeps_one(fraction, expected):
    kept, held = hold_out(split(), fraction, seed=0)
    assert [held.labels.count(k) for k in range(4)] == expected
    assert sorted([*kept.names, *held.names]) == sorted(split().names)
    assert set(kept.labels) == {0, 1, 2, 3}


def test_what_is_held_out_depends_on_names_and_seed_not_on_the_order_of_listing():
    _, held = hold_out(split(), 0.2, seed=0)
    _, shuffled = hold_out(split(np.random.default_rng(0).permutation(54)), 0.2, seed=0)
    _, other = hold_out(split(), 0.2, seed=1)
    assert set(shuffled.names) == set(held.names)
    assert set(other.names) != set(held.names)


def test_pictures_stay_with_their_names_and_labels():
    whole = split()
    for part in hold_out(whole, 0.3, seed=0):
        for i in range(len(part)):
            number = whole.names.index(part.names[i])
            assert part.image(i).getpixel((0, 0)) == (number, number, number)
            assert part.labels[i] == whole.labels[number]


def test_a_picture_that_is_listed_several_times_is_on_one_side():
    whole = split([*range(54), *range(54), 0])
    labels = [*whole.labels[:-1], 1]  # the last row has the first picture in another class
    kept, held = hold_out(ImageSplit(whole.classes, labels, whole.names, whole.pictures), 0.9, seed=0)
    assert not set(kept.names) & set(held.names)
    assert len(kept) + len(held) == len(whole)
    assert [held.labels.count(k) for k in range(4)] == [2 * 35, 2 * 10, 2 * 1, 0]
    assert kept.names.count("a/00") == 3


def test_repeats_change_nothing_about_the_choice():
    _, once = hold_out(split(), 0.2, seed=0)
    _, thrice = hold_out(split([*range(54)] * 3), 0.2, seed=0)
    assert set(thrice.names) == set(once.names)


def test_single_pictures_can_not_be_held_out():
    lonely = ImageSplit(("a", "b"), [0, 1], ["0", "1"], Pixels(np.zeros((2, 1, 1, 3), np.uint8)))
    with pytest.raises(DataError, match="each class has a single picture"):
        hold_out(lonely, 0.5, seed=0)


def test_a_picture_that_another_package_can_not_decode_is_named():
    class Broken:
        def __getitem__(self, index):
            raise OSError("image file is truncated")

    with pytest.raises(DataError, match="x/7 can't be decoded: image file is truncated"):
        ImageSplit(("a",), [0], ["x/7"], Broken()).image(0)
