"""Pictures as bad cameras, weather and file formats leave them, in five strengths.

After ImageNet-C (Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261), by torchvision's transforms: the kinds
it has, at the strengths given there. They act on the picture at the size the model sees it in, so that a strength means
the same for small and large files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vislora.config.commands import Corruption
from vislora.data.order import mix, seeded
from vislora.data.splits import ImageSplit, Pictures
from vislora.data.transforms import Preprocessing, fit_to_size

STRENGTHS = 5
_BLUR_SIZE = 224  # pixels of the pictures that the blur's sigmas are for


@dataclass(frozen=True)
class _Kind:
    """Five strengths, and what one of them does to uint8 [3, H, W]."""

    strengths: tuple[float, ...]
    apply: Callable[[torch.Tensor, float], torch.Tensor]


def _noise(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    return F.to_dtype(F.gaussian_noise(F.to_dtype(picture, torch.float32, scale=True), 0.0, sigma), scale=True)


def _blur(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    # by the root of the size: so the mildest is that of CIFAR-C at 32 pixels as well, and can be seen
    sigma *= (picture.shape[-1] / _BLUR_SIZE) ** 0.5
    # as wide as three sigmas to each side, and not beyond what reflecting the picture's edges allows
    radius = min(max(1, round(3 * sigma)), picture.shape[-1] - 1)
    return F.gaussian_blur(picture, [2 * radius + 1] * 2, [sigma] * 2)


def _brighten(picture: torch.Tensor, step: float) -> torch.Tensor:
    return (picture.float() + 255 * step).round().clamp(0, 255).to(torch.uint8)


def _pixelate(picture: torch.Tensor, share: float) -> torch.Tensor:
    size = list(picture.shape[-2:])
    small = F.resize(picture, [max(1, round(share * side)) for side in size], InterpolationMode.BILINEAR)
    return F.resize(small, size, InterpolationMode.NEAREST_EXACT)


_KINDS: dict[Corruption, _Kind] = {
    Corruption.noise: _Kind((0.08, 0.12, 0.18, 0.26, 0.38), _noise),
    Corruption.blur: _Kind((1, 2, 3, 4, 6), _blur),
    Corruption.brightness: _Kind((0.1, 0.2, 0.3, 0.4, 0.5), _brighten),
    Corruption.contrast: _Kind((0.4, 0.3, 0.2, 0.1, 0.05), F.adjust_contrast),
    Corruption.jpeg: _Kind((25, 18, 15, 10, 7), F.jpeg),
    Corruption.pixelate: _Kind((0.6, 0.5, 0.4, 0.3, 0.25), _pixelate),
}


def corrupt(picture: Image.Image, kind: Corruption, strength: int, seed: int) -> Image.Image:
    """A picture spoiled at a strength from 1 to 5; the same seed gives the same pixels."""
    chosen = _KINDS[kind]
    with seeded(mix(seed, strength)):
        return F.to_pil_image(chosen.apply(F.pil_to_tensor(picture), chosen.strengths[strength - 1]))


def corrupted(split: ImageSplit, kind: Corruption, strength: int, preprocessing: Preprocessing) -> ImageSplit:
    """The split with all its pictures resized and cropped for the model, then spoiled."""
    return replace(split, pictures=_Corrupted(split.pictures, kind, strength, preprocessing))


@dataclass(frozen=True)
class _Corrupted:
    pictures: Pictures
    kind: Corruption
    strength: int
    preprocessing: Preprocessing

    def __getitem__(self, index: int) -> Image.Image:
        picture = fit_to_size(self.preprocessing)(self.pictures[index])
        return corrupt(picture, self.kind, self.strength, index)
