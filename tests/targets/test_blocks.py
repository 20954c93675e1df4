"""choose_blocks understands indices, ranges, counts from either end, and patterns of names."""

import pytest

from vislora.errors import AdapterError
from vislora.targets.blocks import choose_blocks

NAMES = [f"stages.{stage}.blocks.{i}" for stage in range(3) for i in range(4)]


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        (None, list(range(12))),
        ([], []),
        (3, [3]),
        (-1, [11]),
        ("3", [3]),
        ("-2", [10]),
        ([2, 0, -1, 11], [0, 2, 11]),
        ("2-5", [2, 3, 4, 5]),
        ("7-7", [7]),
        ("last:4", [8, 9, 10, 11]),
        ("first:2", [0, 1]),
        ([0, "last:1"], [0, 11]),
        (["0-1", "3-4"], [0, 1, 3, 4]),
        (r"stages\.1\..*", [4, 5, 6, 7]),
        (r"stages\.\d\.blocks\.0", [0, 4, 8]),
        (r".*\.(0|3)", [0, 3, 4, 7, 8, 11]),
        (r"stages.1", None),  # a pattern is for the whole name: it would match more than is meant
    ],
)
def test_notations(blocks, chosen):
    if chosen is None:
        with pytest.raises(AdapterError, match="matches none of the blocks"):
            choose_blocks(blocks, NAMES)
    else:
        assert choose_blocks(blocks, NAMES) == chosen


@pytest.mark.parametrize("blocks", [12, -13, [0, 12], "12", "10-12"])
def test_block_that_is_not_there_is_named_with_the_range(blocks):
    with pytest.raises(AdapterError, match=r"block -?1[23] isn't there; the model has 12, 0 to 11 or -12 to -1"):
        choose_blocks(blocks, NAMES)


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(AdapterError, match="blocks=5-2: no block is in that range"):
        choose_blocks(["5-2", 1], NAMES)


@pytest.mark.parametrize("blocks", ["last:0", "last:13", "first:13"])
def test_more_blocks_than_there_are_are_refused(blocks):
    with pytest.raises(AdapterError, match=rf"blocks={blocks}: the model has 12 blocks"):
        choose_blocks(blocks, NAMES)


def test_malformed_pattern_is_refused_with_what_is_understood():
    with pytest.raises(AdapterError, match=r"neither an index, a range like 2-5, last:4, nor a regular expression"):
        choose_blocks("blocks.(1", NAMES)
