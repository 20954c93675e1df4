"""Which sample comes when, and with which random numbers: a pure function of (seed, step).

Nothing depends on the state of a worker or a process, so that a run may be stopped anywhere and go on, and may be
divided over any number of workers and processes, without changing what is learned from.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vislora.data.splits import ImageSplit
from vislora.errors import ConfigError


class SampleKey(NamedTuple):
    """One showing of one sample; all its randomness is drawn from a generator seeded by it."""

    seed: int
    epoch: int
    index: int


@dataclass(frozen=True)
class Order:
    """The order of a training set.

    An epoch is a permutation drawn from (seed, epoch), divided into `steps_per_epoch` global batches whose sizes
    differ by at most one: every sample once per epoch, and no tiny last batch. A global batch is dealt out to the
    processes, and each process's share is divided into `accumulation` micro-batches, or into one a sample where there
    are fewer samples.

    Attributes:
        size: samples.
        batch_size: largest size of a global batch.
        seed: of the run.
        accumulation: micro-batches of a process per step, at most.
        rank, world: this process among how many.

    Raises:
        ConfigError: the largest batch can't be divided that often, or a process would have no sample in a step.
    """

    size: int
    batch_size: int
    seed: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.accumulation * self.world
        if min(self.size, parts) < 1 or self.batch_size < parts or self.size // self.steps_per_epoch < self.world:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} over {self.size} training images can't be divided into "
                f"{self.accumulation} accumulated passes on {self.world} processes; use larger batches or fewer passes"
            )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / self.batch_size)

    @property
    def smallest_pass(self) -> int:
        """Samples of the smallest micro-batch of all processes."""
        return max(1, self.size // self.steps_per_epoch // self.world // self.accumulation)

    def global_batch(self, step: int) -> list[SampleKey]:
        """All processes' samples of a step, counted from the start of the training."""
        epoch, position = divmod(step, self.steps_per_epoch)
        smaller, larger_ones = divmod(self.size, self.steps_per_epoch)  # the first ones take one sample more
        start = position * smaller + min(position, larger_ones)
        stop = start + smaller + (position < larger_ones)
        chosen = _permutation(self.size, self.seed, epoch)[start:stop]
        return [SampleKey(self.seed, epoch, index) for index in chosen.tolist()]

    def micro_batches(self, step: int) -> list[list[SampleKey]]:
        """This process's samples of a step, one list per accumulated pass."""
        share = self.global_batch(step)[self.rank :: self.world]
        passes = min(self.accumulation, len(share))
        return [[share[i] for i in part] for part in torch.arange(len(share)).tensor_split(passes)]


class MicroBatches(Sampler[list[SampleKey]]):
    """The micro-batches of a run from one step to another, across epochs: a DataLoader's `batch_sampler`."""

    def __init__(self, order: Order, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.start, self.stop):
            yield from self.order.micro_batches(step)


class _Training(Dataset):
    def __init__(self, split: ImageSplit, transform: Callable[[Any], Tensor], patches: tuple[int, int] | None) -> None:
        self.split, self.transform, self.patches = split, transform, patches

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int] | tuple[Tensor, int, Tensor]:
        picture = self.split.image(key.index)
        with seeded(mix(*key)):
            sample = self.transform(picture), self.split.labels[key.index]
            if self.patches is None:
                return sample
            kept, total = self.patches
            return *sample, torch.randperm(total)[:kept]


class _Evaluation(Dataset):
    def __init__(self, split: ImageSplit, transform: Callable[[Any], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(self.split.image(index)), self.split.labels[index], index


def train_loader(
    split: ImageSplit,
    transform: Callable[[Any], Tensor],
    order: Order,
    start: int,
    stop: int,
    workers: int,
    patches: tuple[int, int] | None = None,
) -> DataLoader:
    """Micro-batches (images [b, 3, H, W], labels [b]) of this process, from one step to another.

    Args:
        patches: so many of so many are drawn for each image; their numbers [b, kept] come third in a batch.
    """
    return batch_loader(_Training(split, transform, patches), MicroBatches(order, start, stop), workers)


def eval_loader(
    split: ImageSplit, transform: Callable[[Any], Tensor], batch_size: int, workers: int, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches (images, labels, indices) of this process: every world-th from `rank` on. No padding, nothing twice, and
    the batches are the same ones whatever the number of processes, so that their results are the same bits."""
    batches = [range(len(split))[start : start + batch_size] for start in range(0, len(split), batch_size)]
    # it is gone through once an epoch
    return batch_loader(_Evaluation(split, transform), batches[rank::world], workers, keep_workers=workers > 0)


def batch_loader(
    dataset: Dataset, batches: Iterable[Sequence[Any]], workers: int, keep_workers: bool = False, pin: bool = True
) -> DataLoader:
    """A loader of these batches, each a list of the data set's keys; pinned in memory where there is a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        generator=torch.Generator(),  # or each start of a loader would draw from the one that dropout draws from
        pin_memory=pin and torch.cuda.is_available(),
        persistent_workers=keep_workers,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Meanwhile torch's random numbers on the CPU are those of a seed. torch.manual_seed would reset the GPU's too,
    which dropout draws from."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def mix(*numbers: int) -> int:
    """A seed in [0, 2**63) from several integers, of which neighbouring ones give unrelated seeds.

    Each is added to the state, which then takes a step of SplitMix64 (Steele, Lea & Flood 2014,
    https://doi.org/10.1145/2660193.2660195): the golden ratio's increment and the finaliser.
    """
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch)))
