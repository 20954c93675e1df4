"""Copies of a picture among N, resized and recompressed ones too, found by their thumbnails."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vislora.data.images import THUMBNAIL

# Measured on drawings of 27 species and on photos: copies at half to double size, as JPEG of quality 30 to 90, differ
# in 6 bits of 64 at most and by 0.02 to 0.06; 120 drawings of a species on a plain ground by 0.07 and more, many of
# them in no bit at all, which is why the hash alone doesn't decide.
_BITS = 6
_DIFFERENCE = 0.06
_LEAST_CONTRAST = 4.0  # grey levels, so that the noise of almost blank pictures doesn't count for much

_ROWS = 1024  # hashes that are compared with all others of a band's value at once, which bounds the memory


def copies(thumbnails: Sequence[bytes]) -> list[list[int]]:
    """Groups of indices, each of pictures that are copies of one another.

    A pair is compared where the perceptual hashes differ in a few bits at most, and is one of copies where the
    thumbnails' difference is small beside their contrast.
    """
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL**2)
    distinct, member = np.unique(pixels, axis=0, return_inverse=True)
    pairs = near_pairs(perceptual_hashes(distinct), _BITS)
    alike = pairs[_differences(distinct, pairs) <= _DIFFERENCE]
    root = _components(len(distinct), alike)
    groups: dict[int, list[int]] = {}
    for index, k in enumerate(member.reshape(-1)):
        groups.setdefault(root[k], []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Which of the 8 x 8 lowest frequencies of each thumbnail [N, THUMBNAIL**2] lie above their median: uint64 [N]."""
    k = np.arange(THUMBNAIL)
    cosines = np.cos(np.pi * (2 * k + 1) * k[:8, None] / (2 * THUMBNAIL))  # DCT-II
    grey = thumbnails.reshape(-1, THUMBNAIL, THUMBNAIL).astype(np.float32)
    frequencies = (cosines @ grey @ cosines.T).reshape(-1, 64)
    above = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)  # the first is the mean brightness
    return np.packbits(above, axis=1).view(np.uint64).reshape(-1)


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """All pairs i < j of 64-bit hashes that differ in at most so many bits: int [P, 2].

    Divided into bits + 1 bands, two such hashes agree in a whole band (Norouzi et al. 2012,
    https://arxiv.org/abs/1307.2982): only those are compared.
    """
    found = [np.empty((0, 2), np.intp)]
    for low, high in pairwise(np.linspace(0, 64, bits + 2).astype(int).tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band.max(initial=0) + np.uint64(1)))
        for start, stop in pairwise([*starts.tolist(), len(hashes)]):
            for row in range(start, stop, _ROWS):
                members = order[row:stop]
                different = hashes[members[:_ROWS], None] ^ hashes[members]
                first, second = np.nonzero(np.bitwise_count(different) <= bits)
                found.append(np.stack([members[first], members[second]], axis=1)[first < second])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _differences(pixels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Root mean square difference of each pair, over the geometric mean of their standard deviations."""
    found = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), 100_000):
        a, b = pixels[pairs[start : start + 100_000].T].astype(np.float32)
        contrast = np.sqrt(a.std(axis=1).clip(_LEAST_CONTRAST) * b.std(axis=1).clip(_LEAST_CONTRAST))
        found[start : start + 100_000] = np.sqrt(((a - b) ** 2).mean(axis=1)) / contrast
    return found


def _components(count: int, pairs: np.ndarray) -> list[int]:
    """The smallest index connected with each."""
    root = list(range(count))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for a, b in pairs.tolist():
        a, b = find(a), find(b)
        root[max(a, b)] = min(a, b)
    return [find(index) for index in range(count)]
