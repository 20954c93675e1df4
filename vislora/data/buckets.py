"""Aspect buckets: pictures of like proportions are learned together, at as many pixels as the square would have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from vislora.data.order import Order, SampleKey, mix
from vislora.errors import ConfigError

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Crop:
    """A picture cut to a bucket's size.

    Attributes:
        image: RGB.
        original: size before.
        corner: left and upper edge of the cut, in pixels after resizing.
    """

    image: Image.Image
    original: Size
    corner: tuple[int, int]


def bucket_sizes(side: int, step: int = 64, longest: float = 2.0) -> list[Size]:
    """Sizes of at most side² pixels, their sides multiples of `step`, proportions up to `longest` : 1.

    Raises:
        ConfigError: the side is no multiple of the step, or so small that the square is the only size.
    """
    if side % step or side < step:
        raise ConfigError(
            f"pictures of {side} pixels have no buckets, which go in steps of {step}: give data.size as a multiple of "
            f"that from {3 * step} on, or data.buckets=false"
        )
    sizes = set()
    for width in range(step, math.floor(side * math.sqrt(longest)) + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= longest:
            sizes |= {(width, height), (height, width)}
    if len(sizes) == 1:
        raise ConfigError(
            f"data.size={side} has no bucket but the square; give {3 * step} or more, or data.buckets=false"
        )
    return sorted(sizes)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose proportions are nearest, in ratio."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: abs(math.log(s[0] / s[1]) - ratio))


def cut(picture: Image.Image, size: Size) -> Crop:
    """Resize a picture until it just covers `size`, with antialiasing, and cut out its middle."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    covering = tuple(max(round(scale * side), wanted) for side, wanted in zip(picture.size, size, strict=True))
    left, top = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    x, y = picture.width / covering[0], picture.height / covering[1]
    # only what is kept is resized: of a panorama the whole would take gigabytes
    box = (left * x, top * y, min((left + size[0]) * x, picture.width), min((top + size[1]) * y, picture.height))
    return Crop(picture.resize(size, Image.Resampling.BICUBIC, box), picture.size, (left, top))


@dataclass(frozen=True)
class BucketOrder(Order):
    """An `Order` in which every global batch holds samples of one bucket.

    Each bucket is shuffled and divided into batches by itself; then the batches of all buckets are shuffled.

    Attributes:
        buckets: number of the bucket of each sample.
    """

    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = [self.buckets.count(bucket) for bucket in sorted(set(self.buckets))]
        smallest = min((count // math.ceil(count / self.batch_size) for count in counts), default=0)
        if smallest < self.world:
            raise ConfigError(
                f"a bucket's batch of {smallest} pictures can't be divided among {self.world} processes; use fewer "
                "processes, more data.repeats, or data.buckets=false"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self._batches(0))

    def global_batch(self, step: int) -> list[SampleKey]:
        """All processes' samples of a step, counted from the start of the training."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return [SampleKey(self.seed, epoch, index) for index in self._batches(epoch)[position].tolist()]

    def _batches(self, epoch: int) -> list[Tensor]:
        return _bucket_batches(self.buckets, self.batch_size, self.seed, epoch)


@lru_cache(maxsize=4)
def _bucket_batches(buckets: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    batches: list[Tensor] = []
    numbers = torch.tensor(buckets)
    for bucket in sorted(set(buckets)):
        members = (numbers == bucket).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        batches += members.tensor_split(math.ceil(len(members) / batch_size))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
