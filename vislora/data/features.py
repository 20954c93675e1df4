"""Features of a frozen prefix in place of pictures: computed once, kept in memory or in a file, read in every epoch.

A picture has one row of features, or two where a random flip is the only augmentation: as it is, and mirrored. Rows in
a file are found by what decides them: the prefix (its key) and the pixels of every picture.
"""

import errno
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from vislora.config.training import PrefixCache
from vislora.data.order import Order, SampleKey, eval_loader, mix, seeded
from vislora.data.splits import ImageSplit
from vislora.errors import ConfigError, DataError
from vislora.files import reserve
from vislora.paths import cache_dir
from vislora.precision import training_attention

_BATCH = 32  # pictures at once; always as many, so that the same rows come out bit for bit


class Extractor(Protocol):
    """What turns pictures into features; see `vislora.models.prefix.Prefix`."""

    shape: Sequence[int]
    dtype: torch.dtype

    def features(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """Of N pictures: rows [N, variants, …], and their labels [N]."""

    rows: Tensor
    labels: Tensor

    def training(self, order: Order, start: int, stop: int, hflip: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches (features [b, …], labels [b]) of this process, mirrored where the pictures would have been."""
        for step in range(start, stop):
            for keys in order.micro_batches(step):
                index = torch.tensor([key.index for key in keys])
                variant = torch.tensor([_is_flipped(key, hflip) if hflip else 0 for key in keys])
                yield self.rows[index, variant], self.labels[index]

    def evaluation(self, batch_size: int, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
        """This process's batches, the same ones as those of `vislora.data.order.eval_loader`."""
        batches = list(zip(self.rows[:, 0].split(batch_size), self.labels.split(batch_size), strict=True))
        return batches[rank::world]


def compute_features(
    split: ImageSplit,
    transform: Callable[[Any], Tensor],
    flips: bool,
    prefix: Extractor,
    key: str,
    where: PrefixCache,
    autocast: torch.dtype | None,
    workers: int,
    accelerator: Accelerator,
) -> Features:
    """Features of all pictures, divided among the processes; called by all of them.

    Args:
        split: N pictures.
        transform: the one of evaluation.
        flips: whether mirrored pictures are needed too.
        prefix: its model on the device, in eval mode.
        key: of all that decides the features of a picture.
        where: in memory, or in a file of the cache that the next run finds.
        autocast: the dtype of autocast; None where it is off.
        workers: loader processes.
        accelerator: of the run.

    Raises:
        ConfigError: they don't fit on the disk, or the processes don't share the cache.
        DataError: the file of the cache is damaged.
    """
    shape = (len(split), 1 + flips, *prefix.shape)
    labels = torch.tensor(list(split.labels))
    place = (accelerator.process_index, accelerator.num_processes)
    pictures = eval_loader(split, transform, _BATCH, workers, *place)
    if where is PrefixCache.memory:
        rows = torch.zeros(shape, dtype=prefix.dtype)
        _fill(rows, pictures, prefix, autocast, accelerator)
        if accelerator.num_processes > 1:
            for part in rows.split(1024):  # each row is zero in all processes but one
                part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))
        return Features(rows, labels)
    path = cache_dir() / "prefix" / f"{_key_of_pictures(pictures, f'{key} {shape}')}.features"
    # another run may be filling, or finish, the same file: this one's part is its own, and one process decides
    (part,) = broadcast_object_list([None if path.is_file() else path.with_name(f"{path.name}.{uuid4().hex}.part")])
    if part is not None:
        try:
            if accelerator.is_main_process:
                _reserve(part, math.prod(shape) * prefix.dtype.itemsize)
            accelerator.wait_for_everyone()
            if not part.is_file():
                raise ConfigError(
                    f"{part} can't be seen by all processes; trainer.prefix_cache=disk needs a shared folder"
                )
            _fill(_mapped(part, shape, prefix.dtype, written=True), pictures, prefix, autocast, accelerator)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(part, path)
            accelerator.wait_for_everyone()
        finally:
            if accelerator.is_main_process:
                part.unlink(missing_ok=True)
    try:
        return Features(_mapped(path, shape, prefix.dtype, written=False), labels)
    except RuntimeError as error:
        raise DataError(f"{path} of the cache can't be read ({error}); delete it, the next run makes it anew") from None


def _fill(
    rows: Tensor, pictures: DataLoader, prefix: Extractor, autocast: torch.dtype | None, accelerator: Accelerator
) -> None:
    device = accelerator.device
    bar = {"unit": "batch", "delay": 2, "leave": False, "disable": None if accelerator.is_main_process else True}
    with training_attention(accelerator), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for images, _, index in tqdm(pictures, "prefix cache", **bar):
            images = images.to(device)
            for variant in range(rows.shape[1]):
                seen = images.flip(-1) if variant else images
                rows[index, variant] = prefix.features(seen).to("cpu", rows.dtype)


def _key_of_pictures(pictures: DataLoader, key: str) -> str:
    mine = [
        (i, hashlib.sha256(image.numpy()).hexdigest())
        for images, _, index in pictures
        for i, image in zip(index.tolist(), images, strict=True)
    ]
    return hashlib.sha256(f"{key} {sorted(gather_object(mine))}".encode()).hexdigest()[:32]


def _reserve(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        reserve(path, size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ConfigError(
            f"trainer.prefix_cache=disk: {error.strerror} in {path.parent}; point VISLORA_CACHE elsewhere, or set "
            "trainer.prefix_cache=off"
        ) from None


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, written: bool) -> Tensor:
    # only what is written to is shared: that needs leave to write, and a file that was cut off would grow by zeros
    return torch.from_file(str(path), shared=written, size=math.prod(shape), dtype=dtype).view(shape)


def _is_flipped(key: SampleKey, hflip: float) -> int:
    """What RandomHorizontalFlip does to a sample, shown to it on two pixels: the first comes out 0 or 1."""
    with seeded(mix(*key)):
        return int(v2.RandomHorizontalFlip(hflip)(torch.tensor([[[0, 1]]]))[0, 0, 0])
