"""Which blocks of a model: the notations of `adapter.blocks`."""

import re
from collections.abc import Sequence

from vislora.errors import AdapterError

Blocks = int | str | Sequence[int | str] | None
"""None for all blocks, or one or several of:

    3, -1            an index, from either end
    "2-5"            a range of indices, both ends included
    "last:4"         so many at the end; "first:4" at the beginning
    "stages\\.3\\..*"  a regular expression for a block's whole name
"""


def choose_blocks(blocks: Blocks, names: Sequence[str]) -> list[int]:
    """The indices of the chosen blocks, sorted.

    Args:
        blocks: see `Blocks`.
        names: the module names of all blocks, in the order of the model.

    Raises:
        AdapterError: a block that isn't there, or a pattern that is malformed or matches none.
    """
    if blocks is None:
        return list(range(len(names)))
    if isinstance(blocks, int | str):
        blocks = [blocks]
    return sorted({index for block in blocks for index in _indices(block, names)})


def _indices(block: int | str, names: Sequence[str]) -> Sequence[int]:
    count = len(names)
    if isinstance(block, int):
        return [_checked(block, count)]
    if found := re.fullmatch(r"(\d+)-(\d+)", block):
        first, last = _checked(int(found[1]), count), _checked(int(found[2]), count)
        if first > last:
            raise AdapterError(f"blocks={block}: no block is in that range; write the smaller number first")
        return range(first, last + 1)
    if found := re.fullmatch(r"(first|last):(\d+)", block):
        number = int(found[2])
        if not 1 <= number <= count:
            raise AdapterError(f"blocks={block}: the model has {count} blocks")
        return range(number) if found[1] == "first" else range(count - number, count)
    if re.fullmatch(r"-?\d+", block):
        return [_checked(int(block), count)]
    try:
        matching = [index for index, name in enumerate(names) if re.fullmatch(block, name)]
    except re.error as error:
        raise AdapterError(
            f"blocks={block}: neither an index, a range like 2-5, last:4, nor a regular expression: {error}"
        ) from None
    if not matching:
        raise AdapterError(f"blocks={block} matches none of the blocks {', '.join(names)}")
    return matching


def _checked(index: int, count: int) -> int:
    if not -count <= index < count:
        raise AdapterError(f"block {index} isn't there; the model has {count}, 0 to {count - 1} or -{count} to -1")
    return index % count
