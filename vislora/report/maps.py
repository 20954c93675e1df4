"""What a classifier looked at, laid over the pictures."""

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

_COLOURS = colormaps["RdBu_r"]


def overlay(picture: Image.Image, attribution: Tensor, full: float) -> Image.Image:
    """A picture in grey under a map [H, W] of its size: red speaks for the class, blue against it.

    Args:
        full: the value that is shown in full colour.
    """
    strength = (attribution / full).clamp(-1, 1).numpy()
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    alpha = np.abs(strength)[..., None] ** 0.7 * 0.9
    colours = _COLOURS(0.5 + strength / 2)[..., :3]
    mixed = (1 - alpha) * (0.25 + 0.75 * grey) + alpha * colours
    return Image.fromarray((255 * mixed).round().astype(np.uint8))
