"""A supersampled sheet on which shapes are painted: crisp outlines, soft marks inside them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .colour import RGB
from .patch import Patch


@dataclass(frozen=True)
class Stencil:
    """Where a shape was painted: a mask (L, 0-255) whose upper left corner lies at `corner`."""

    mask: Image.Image
    corner: tuple[int, int]


class Sheet:
    """An RGB image to paint on, in its own pixels.

    Args:
        ground: what is there before; painted over in place.
        softness: blur of the marks inside a shape, in pixels.
        line: width of the ink line around shapes in pixels, 0 for none. Lines are kept apart, in `ink`.
    """

    def __init__(self, ground: Image.Image, softness: float = 0.0, line: int = 0) -> None:
        self.image = ground
        self.softness = softness
        self.line = line
        self.ink = Image.new("L", ground.size, 0)

    def shape(
        self, outlines: list[np.ndarray], colour: RGB, patches: list[Patch] = (), unit: float = 1.0
    ) -> Stencil | None:
        """Paint the union of `outlines` (pixels) in `colour`, with `patches` inside.

        Patch widths are multiplied by `unit`. Returns None where nothing of the shape is on the sheet.
        """
        corners = np.array([[*outline.min(axis=0), *outline.max(axis=0)] for outline in outlines])
        left, top = np.maximum(np.floor(corners[:, :2].min(axis=0)) - 1, 0).astype(int)
        right, bottom = np.minimum(np.ceil(corners[:, 2:].max(axis=0)) + 2, self.image.size).astype(int)
        if right <= left or bottom <= top:
            return None
        corner = (int(left), int(top))
        extent = (int(right - left), int(bottom - top))
        mask = Image.new("L", extent, 0)
        pen = ImageDraw.Draw(mask)
        for outline in outlines:
            pen.polygon(_flat(outline, corner), fill=255)
        stencil = Stencil(mask, corner)
        if patches:
            self.image.paste(self._layer(extent, corner, colour, patches, unit), corner, mask)
        else:
            self.image.paste(colour, (*corner, *(int(right), int(bottom))), mask)
        if self.line:
            self._outline(stencil)
        return stencil

    def _layer(self, extent, corner, colour, patches, unit) -> Image.Image:
        layer = Image.new("RGB", extent, colour)
        pen = ImageDraw.Draw(layer)
        for patch in patches:
            if patch.width:
                pen.line(_flat(patch.points, corner), fill=patch.colour, width=max(1, round(patch.width * unit)))
            else:
                pen.polygon(_flat(patch.points, corner), fill=patch.colour)
        return layer.filter(ImageFilter.BoxBlur(self.softness)) if self.softness else layer

    def _outline(self, stencil: Stencil) -> None:
        """Later shapes hide the lines under them and add their own."""
        inner = stencil.mask.filter(ImageFilter.MinFilter(2 * self.line + 1))
        self.ink.paste(0, stencil.corner, stencil.mask)
        self.ink.paste(255, stencil.corner, ImageChops.subtract(stencil.mask, inner))


def _flat(points: np.ndarray, corner: tuple[int, int]) -> list[float]:
    """Points as Pillow wants them: x0, y0, x1, y1, …, from the layer's corner."""
    return (points - corner).ravel().tolist()
