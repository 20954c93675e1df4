"""From an RGB picture to what a model takes, in training and in validation, by torchvision's transforms."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torchvision.transforms import InterpolationMode, v2

from vislora.config.data import AugmentConfig
from vislora.errors import ModelError

_CROP_MODES = ("center", "squash", "border")
_INTERPOLATIONS = tuple(mode.value for mode in InterpolationMode)


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants its images to be.

    Attributes:
        size: pixels of each side.
        mean, std: of the RGB channels, in units of [0, 1].
        interpolation: "bicubic", "bilinear" or another of torchvision's.
        crop_pct: share of the resized picture's side that the centre crop keeps.
        crop_mode: what is resized to size / crop_pct: the shorter side ("center"), each side ("squash"), or the longer
            one ("border", which fills up with the mean colour). timm's words.

    Raises:
        ModelError: a crop_mode or interpolation that isn't known.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.crop_mode not in _CROP_MODES or self.interpolation not in _INTERPOLATIONS:
            raise ModelError(
                f"the model's pictures are prepared with crop_mode={self.crop_mode!r}, "
                f"interpolation={self.interpolation!r}; expected one of {', '.join(_CROP_MODES)}, and one of "
                f"{', '.join(_INTERPOLATIONS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Preprocessing":
        return Preprocessing(**values | {"mean": tuple(values["mean"]), "std": tuple(values["std"])})


def eval_transform(p: Preprocessing) -> v2.Compose:
    """PIL RGB -> float32 [3, size, size]: resized to floor(size / crop_pct) by the crop_mode, as timm does it, then a
    centre crop."""
    return v2.Compose([*_resize_and_crop(p), *_to_tensor(p)])


def fit_to_size(p: Preprocessing) -> v2.Compose:
    """The same up to the pixels: PIL RGB -> PIL RGB of size x size."""
    return v2.Compose(_resize_and_crop(p))


def train_transform(p: Preprocessing, augment: AugmentConfig) -> v2.Compose:
    """The same with augmentation; its random numbers come from torch's global generator."""
    steps: list[Callable] = []
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


def _resize_and_crop(p: Preprocessing) -> list[Callable]:
    # Pillow resizes with antialiasing, and v2 leaves a picture alone that has the size already
    size, mode = math.floor(p.size / p.crop_pct), InterpolationMode(p.interpolation)
    if p.crop_mode == "border":
        fill = [round(255 * value) for value in p.mean]
        return [ResizeKeepRatio(size, longest=1.0, interpolation=p.interpolation), CenterCropOrPad(p.size, fill)]
    return [v2.Resize((size, size) if p.crop_mode == "squash" else size, mode), v2.CenterCrop(p.size)]


def _to_tensor(p: Preprocessing) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(p.mean, p.std)]
