"""The pixel style: a coarse grid, few colours, a dark outline, no smoothing."""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .backdrops import backdrop_image
from .flat import two_tones
from .natural import grade
from .plate import paint_plate
from .scene import Scene
from .species import Species

BIRD_COLOURS = 12
GROUND_STEP = 22  # between the brightness levels of a ground
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], dtype=np.float32) / 16 - 0.47


def pixel(species: Species, scene: Scene, size: int) -> Image.Image:
    """Pixel art: cells of one colour, 32-64 of them across."""
    cell = max(1, size // 32 if size < 192 else size // 64)
    cells = -(-size // cell)
    # Painted at its own resolution, without smoothing, so that every cell belongs to one shape.
    plate = paint_plate(species, scene, _dithered(backdrop_image(scene, cells)))
    light = two_tones(plate.bird, plate.wing, scene, plate.extent, 1)
    picture = grade(np.asarray(plate.image, dtype=np.float32) * light[..., None], scene)
    picture = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    inside = np.asarray(plate.bird) > 127
    picture[inside] = _few_colours(picture[inside])
    # Legs and needle bills are one cell wide: an outline would make them three.
    stout = plate.bird.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(5))
    rim = ImageChops.subtract(stout, plate.bird)
    picture[np.asarray(rim) > 127] = (picture[np.asarray(rim) > 127] * 0.25 + (10, 8, 14)).astype(np.uint8)
    enlarged = Image.fromarray(picture).resize((cells * cell, cells * cell), Image.Resampling.NEAREST)
    return enlarged.crop((0, 0, size, size))


def _few_colours(colours: np.ndarray) -> np.ndarray:
    """[N, 3] bytes reduced to a palette; rare colours keep a place in it, since field marks are small."""
    if len(colours) == 0:
        return colours
    strip = Image.fromarray(colours[None])
    return np.asarray(
        strip.quantize(BIRD_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
    )[0]


def _dithered(ground: Image.Image) -> Image.Image:
    """Few levels, with the ordered dither of old screens between them."""
    cells = ground.width
    repeats = -(-cells // 4)
    pattern = np.tile(_BAYER, (repeats, repeats))[:cells, :cells, None]
    colours = np.asarray(ground, dtype=np.float32)
    # Levels of brightness, not of each channel: those would speckle the ground with strange hues.
    brightness = colours.mean(axis=2, keepdims=True)
    levels = np.rint(brightness / GROUND_STEP + 0.7 * pattern) * GROUND_STEP
    return Image.fromarray(np.clip(colours * levels / np.maximum(brightness, 1.0), 0, 255).astype(np.uint8))
