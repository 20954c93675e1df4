"""Pictures of like proportions share a batch, and lose little at their edges."""

import math

import numpy as np
import pytest
from PIL import Image

from vislora.data.buckets import BucketOrder, bucket_sizes, cut, nearest
from vislora.errors import ConfigError


@pytest.mark.parametrize("side", [512, 1024])
def test_buckets_have_the_squares_pixels_in_sides_of_multiples_of_64(side):
    sizes = bucket_sizes(side)
    assert (side, side) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    for w, h in sizes:
        assert w % 64 == h % 64 == 0
        assert 0.75 * side * side <= w * h <= side * side
        assert 0.5 <= w / h <= 2.0


def test_a_side_that_is_no_multiple_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"^pictures of 500 pixels have no buckets, .* as a multiple of that from 192 on",
    ):
        bucket_sizes(500)


@pytest.mark.parametrize("side", [64, 128])
def test_a_side_that_leaves_nothing_but_squares_is_refused(side):
    with pytest.raises(ConfigError, match=rf"data\.size={side} has no bucket but the square; give 192 or more"):
        bucket_sizes(side)
    assert len(bucket_sizes(192)) == 3


@pytest.mark.parametrize("size", [(300, 200), (133, 977), (50, 40), (65, 64), (3000, 64)])
def test_a_cut_is_the_middle_of_the_whole_picture_resized(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    factor = 64 / min(size)
    whole = picture.resize((round(factor * size[0]), round(factor * size[1])), Image.Resampling.BICUBIC)
    crop = cut(picture, (64, 64))
    left, top = crop.corner
    assert (left, top) == ((whole.width - 64) // 2, (whole.height - 64) // 2)
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64))).astype(int)
    assert np.abs(np.asarray(crop.image) - expected).max() <= 1  # of rounding


def test_a_picture_goes_where_its_proportions_are_nearest():
    sizes = bucket_sizes(512)
    assert nearest((3000, 3000), sizes) == (512, 512)
    for size in ((1920, 1080), (1080, 1920), (100, 1000), *((width, 600) for width in range(300, 1200, 5))):
        chosen = nearest(size, sizes)
        distance = abs(math.log(chosen[0] / chosen[1] * size[1] / size[0]))
        assert all(distance <= abs(math.log(w / h * size[1] / size[0])) + 1e-12 for w, h in sizes)


def test_the_middle_is_cut_out_of_the_resized_picture():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    crop = cut(picture, (64, 64))
    assert crop.image.size == (64, 64)
    assert crop.original == (300, 100)
    assert crop.corner == (64, 0)
    assert {crop.image.getpixel((x, 32)) for x in (8, 32, 56)} == {(0, 0, 255)}


def test_a_picture_is_made_smaller_without_aliasing():
    stripes = Image.fromarray(np.tile(np.array([0, 255, 255, 0], np.uint8), (256, 64))).convert("RGB")
    found = np.asarray(cut(stripes, (64, 64)).image)
    assert np.abs(found[:, 2:-2].astype(float) - 127.5).max() < 2  # every fourth column alone would be black


def test_a_picture_of_the_size_itself_is_left_alone():
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    assert cut(picture, (64, 64)).image.tobytes() == picture.tobytes()


def test_every_picture_comes_once_an_epoch_in_batches_of_its_bucket():
    buckets = tuple(i % 3 for i in range(40)) + (2,) * 9
    order = BucketOrder(len(buckets), 4, seed=3, buckets=buckets)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [[key.index for key in order.global_batch(step)] for step in steps]
        assert sorted(i for batch in batches for i in batch) == list(range(len(buckets)))
        for batch in batches:
            assert len({buckets[i] for i in batch}) == 1
            assert len(batch) <= 4
        assert len({buckets[batch[0]] for batch in batches[:4]}) > 1  # buckets are mixed
    assert order.global_batch(0) != order.global_batch(order.steps_per_epoch)
    assert order.global_batch(5) == BucketOrder(len(buckets), 4, seed=3, buckets=buckets).global_batch(5)


def test_processes_and_passes_share_a_batch_without_overlap():
    buckets = (0,) * 8 + (1,) * 8
    orders = [BucketOrder(16, 4, 0, accumulation=2, rank=rank, world=2, buckets=buckets) for rank in range(2)]
    for step in range(4):
        parts = [key for order in orders for micro in order.micro_batches(step) for key in micro]
        assert sorted(parts) == sorted(orders[0].global_batch(step))


def test_a_bucket_too_small_for_the_processes_is_refused():
    with pytest.raises(ConfigError, match=r"batch of 1 pictures can't be divided among 2 processes"):
        BucketOrder(9, 4, 0, world=2, buckets=(0,) * 8 + (1,))


def test_more_passes_than_a_batch_has_pictures_are_refused():
    with pytest.raises(ConfigError, match=r"can't be divided into 8 accumulated passes on 1 processes"):
        BucketOrder(8, 4, 0, accumulation=8, buckets=(0,) * 8)


def test_a_bucket_smaller_than_the_accumulated_passes_is_learned_too():
    order = BucketOrder(5, 4, 0, accumulation=4, buckets=(0,) * 4 + (1,))
    assert sorted(len(order.micro_batches(step)) for step in range(2)) == [1, 4]
