"""Copies of a picture among N, resized and recompressed ones too, found by their thumbnails."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from vislora.data.images import CHROMA, THUMBNAIL

# Measured on drawings of 27 species and on photos: copies at half to double size, as JPEG of quality 30 to 90, differ
# in 6 bits of 64 at most and by 0.02 to 0.06; 120 drawings of a species on a plain ground by 0.07 and more, many of
# them in no bit at all, which is why the hash alone doesn't decide.
_BITS = 6
_DIFFERENCE = 0.06
# Their colours differ by up to 2.6 levels; those of drawings in other hues, 30 degrees away, by 4 and more.
_COLOURS = 3.0
_LEAST_CONTRAST = 4.0  # grey levels, so that the noise of almost blank pictures doesn't count for much

_COMPARED = 1 << 17  # pairs that are compared at once, which bounds the memory


def copies(thumbnails: Sequence[bytes]) -> list[list[int]]:
    """Groups of indices, each of pictures that are copies of one another.

    A pair is compared where the perceptual hashes differ in a few bits at most, and is one of copies where the
    thumbnails' difference is small beside their contrast, and their colours are the same.
    """
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL**2 + 2 * CHROMA**2)
    distinct, member = np.unique(pixels, axis=0, return_inverse=True)
    grey, colours = np.split(distinct, [THUMBNAIL**2], axis=1)
    joined = np.arange(len(distinct))
    for pairs in near_pairs(perceptual_hashes(grey), _BITS, joined):
        pairs = pairs[_differences(grey, pairs) <= _DIFFERENCE]
        _join(joined, pairs[_colours_apart(colours, pairs) <= _COLOURS])
    groups: dict[int, list[int]] = {}
    for index, k in enumerate(member.reshape(-1).tolist()):
        groups.setdefault(_first(joined, k), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def among(thumbnails: Sequence[bytes], known: Sequence[bytes]) -> list[int]:
    """Indices of the thumbnails that are copies of one of `known`."""
    groups = copies([*known, *thumbnails])
    return sorted(i - len(known) for group in groups if group[0] < len(known) for i in group if i >= len(known))


def perceptual_hashes(grey: np.ndarray) -> np.ndarray:
    """Which of the 8 x 8 lowest frequencies of each thumbnail's grey values [N, THUMBNAIL**2] lie above their median:
    uint64 [N]."""
    k = np.arange(THUMBNAIL)
    cosines = np.cos(np.pi * (2 * k + 1) * k[:8, None] / (2 * THUMBNAIL))  # DCT-II
    squares = grey.reshape(-1, THUMBNAIL, THUMBNAIL).astype(np.float32)
    frequencies = (cosines @ squares @ cosines.T).reshape(-1, 64)
    above = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)  # the first is the mean brightness
    return np.packbits(above, axis=1).view(np.uint64).reshape(-1)


def near_pairs(hashes: np.ndarray, bits: int, joined: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """All pairs i < j of 64-bit hashes [N] that differ in at most so many bits, in parts int [P, 2]; a pair may come
    several times.

    Divided into bits + 1 bands, two such hashes agree in a whole band (Norouzi et al. 2012,
    https://arxiv.org/abs/1307.2982): only those are compared.

    Args:
        joined: int [N]; pairs of which both have the same number, as it is at that time, are passed over. Of a camera
            that stands still all pairs of pictures are near: more than memory holds, and a few of them join the rest.
    """
    joined = np.arange(len(hashes)) if joined is None else joined
    for low, high in pairwise(np.linspace(0, 64, bits + 2).astype(int).tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band.max(initial=0) + np.uint64(1)))
        for start, stop in pairwise([*starts.tolist(), len(hashes)]):
            rows = max(1, _COMPARED // (stop - start))
            for row in range(start, stop, rows):
                members = order[row:stop]
                own = joined[members]
                if (own == own[0]).all():
                    break
                near = np.bitwise_count(hashes[members[:rows], None] ^ hashes[members]) <= bits
                first, second = np.nonzero(near & (own[:rows, None] != own))
                yield np.sort(np.stack([members[first], members[second]], axis=1)[first < second], axis=1)


def _differences(pixels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Root mean square difference of each pair, over the geometric mean of their standard deviations."""
    a, b = pixels[pairs.T].astype(np.float32)
    contrast = np.sqrt(a.std(axis=1).clip(_LEAST_CONTRAST) * b.std(axis=1).clip(_LEAST_CONTRAST))
    return np.sqrt(((a - b) ** 2).mean(axis=1)) / contrast


def _colours_apart(colours: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Root mean square distance of each pair's colours [N, 2 * CHROMA**2], in levels."""
    a, b = colours[pairs.T].astype(np.float32)
    return np.sqrt(2 * ((a - b) ** 2).mean(axis=1))


def _join(joined: np.ndarray, pairs: np.ndarray) -> None:
    """Lead both of each pair, and all that is joined with them, to the smallest index."""
    for a, b in pairs.tolist():
        a, b = _first(joined, a), _first(joined, b)
        joined[max(a, b)] = min(a, b)
    for k in np.unique(pairs).tolist():
        joined[k] = _first(joined, k)


def _first(joined: np.ndarray, index: int) -> int:
    while (before := int(joined[index])) != index:
        index = before
    return index
