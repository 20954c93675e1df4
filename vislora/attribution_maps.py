"""What a classifier looks at, before and after its adapter."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from vislora.baselines import without_update
from vislora.data.transforms import eval_transform, fit_to_size
from vislora.metrics.attribution import integrated_gradients
from vislora.recognizer import Recognizer
from vislora.report.maps import overlay
from vislora.report.sheets import Tile, contact_sheet

_SMOOTHED = 1 / 32  # sigma, as a share of the picture's side
_AT_ONCE = 8  # pictures: a gradient keeps all that the model computes of each


def draw_maps(recognizer: Recognizer, pictures: Sequence[tuple[str, Image.Image]], device: torch.device) -> Image.Image:
    """A sheet with a column for each (caption, picture): the picture, the map of the base model under the adapter's
    head (where there is an adapter), and the map of the adapted model; both for the class that the adapted model
    predicts, and in one scale for the two.
    """
    images = torch.stack([eval_transform(recognizer.preprocessing)(picture) for _, picture in pictures]).to(device)
    with torch.no_grad():
        probability, classes = recognizer.model(images).float().softmax(1).max(1)
    maps = {"adapted" if recognizer.adapters else "model": _maps(recognizer, images, classes)}
    if recognizer.adapters is not None:
        with without_update(recognizer):
            maps = {"base": _maps(recognizer, images, classes)} | maps
    # the strongest 1% of both maps may saturate, so that one pixel doesn't pale all others
    full = torch.stack(list(maps.values())).abs().flatten(2).quantile(0.99, dim=2).amax(0).clamp_min(1e-12)
    seen = [fit_to_size(recognizer.preprocessing)(picture) for _, picture in pictures]
    tiles = [Tile(picture, (caption,)) for picture, (caption, _) in zip(seen, pictures, strict=True)]
    for which, attribution in maps.items():
        for i, picture in enumerate(seen):
            said = (f"{which}: {recognizer.classes[classes[i]]}",)
            if which != "base":  # whose own prediction may be another
                said += (f"{probability[i]:.0%}",)
            tiles.append(Tile(overlay(picture, attribution[i], full[i].item()), said))
    return contact_sheet(tiles, columns=len(pictures))


def _maps(recognizer: Recognizer, images: Tensor, classes: Tensor) -> Tensor:
    """Maps [B, H, W] on the CPU, blurred by a Gaussian, which reflects them at the edges."""
    parts = zip(images.split(_AT_ONCE), classes.split(_AT_ONCE), strict=True)
    maps = torch.cat([integrated_gradients(lambda x: recognizer.model(x).float(), *part) for part in parts])
    sigma = _SMOOTHED * maps.shape[-1]
    return gaussian_blur(maps[:, None], 2 * max(1, round(3 * sigma)) + 1, sigma)[:, 0].cpu()
