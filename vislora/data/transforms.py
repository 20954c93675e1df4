"""From an RGB picture to what a model takes, in training and in validation, by torchvision's transforms."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from vislora.config import AugmentConfig


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants its images to be.

    Attributes:
        size: pixels of each side.
        mean, std: of the RGB channels, in units of [0, 1].
        interpolation: "bicubic" or "bilinear".
        crop_pct: share of the resized picture's shorter side that the centre crop keeps.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Preprocessing":
        return Preprocessing(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})


def eval_transform(p: Preprocessing) -> v2.Compose:
    """PIL RGB -> float32 [3, size, size]: the shorter side resized to floor(size / crop_pct), as timm does it, then a
    centre crop."""
    return v2.Compose([*_resize_and_crop(p), *_to_tensor(p)])


def fit_to_size(p: Preprocessing) -> v2.Compose:
    """The same up to the pixels: PIL RGB -> PIL RGB of size x size."""
    return v2.Compose(_resize_and_crop(p))


def train_transform(p: Preprocessing, augment: AugmentConfig) -> v2.Compose:
    """The same with augmentation; its random numbers come from torch's global generator."""
    steps: list[v2.Transform] = []
    if augment.rotate:
        steps.append(v2.RandomRotation(augment.rotate, InterpolationMode.BILINEAR))
    if augment.crop_scale < 1.0:
        scale = (augment.crop_scale, 1.0)
        steps.append(v2.RandomResizedCrop(p.size, scale, interpolation=InterpolationMode(p.interpolation)))
    else:
        steps += _resize_and_crop(p)
    if augment.hflip:
        steps.append(v2.RandomHorizontalFlip(augment.hflip))
    if c := augment.color_jitter:
        steps.append(v2.ColorJitter(c, c, c, c / 4))
    steps += _to_tensor(p)
    if augment.erase:
        steps.append(v2.RandomErasing(augment.erase))
    return v2.Compose(steps)


def _resize_and_crop(p: Preprocessing) -> list[v2.Transform]:
    # Pillow resizes with antialiasing, and v2 leaves a picture alone that has the size already
    shorter = math.floor(p.size / p.crop_pct)
    return [v2.Resize(shorter, InterpolationMode(p.interpolation)), v2.CenterCrop(p.size)]


def _to_tensor(p: Preprocessing) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]
