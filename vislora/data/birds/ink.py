"""The ink style: a sketch on paper, outlined and hatched, with a light wash of colour."""

import numpy as np
from PIL import Image, ImageFilter

from .natural import shading, share
from .plate import paint_plate
from .scene import Scene
from .species import Species

PAPER = np.array((247, 241, 227), dtype=np.float32)
INK = np.array((38, 32, 34), dtype=np.float32)
WASH = 0.82  # how much of a colour the wash lets through


def ink(species: Species, scene: Scene, size: int) -> Image.Image:
    """Pen and wash: darker colours are hatched more densely, so field marks stay where they are."""
    factor = 4 if size < 48 else 3 if size < 200 else 2
    pixels = size * factor
    line = max(1, round(0.0042 * pixels))
    ground = Image.new("RGB", (pixels, pixels), tuple(int(channel) for channel in PAPER))
    plate = paint_plate(species, scene, ground, line=line)
    colours = np.asarray(plate.image, dtype=np.float32)
    bird = share(plate.bird)
    light = shading(share(plate.bird.reduce(factor)), share(plate.wing.reduce(factor)), scene, plate.extent)
    light = Image.fromarray(light.astype(np.float32)).resize((pixels, pixels), Image.Resampling.BILINEAR)
    tone = colours @ np.array((0.30, 0.59, 0.11), dtype=np.float32) / 255 * np.minimum(np.asarray(light), 1.1)
    # A pen's line is never quite closed: it thins where the noise is low.
    wobble = _wobble(scene, pixels)
    lines = share(plate.ink.filter(ImageFilter.BoxBlur(0.3 * line))) * np.clip(1.0 + 0.35 * wobble, 0.35, 1.0)
    marks = np.maximum(lines, _hatching(tone, wobble, pixels, size) * (0.55 + 0.35 * bird))
    wash = WASH * (0.42 + 0.58 * bird)[..., None] * (0.88 + 0.12 * np.clip(wobble, -1, 1))[..., None]
    picture = PAPER * (1.0 - wash) + np.minimum(colours, PAPER) * wash
    picture = picture + (INK - picture) * marks[..., None]
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8)).reduce(factor)


def _hatching(tone: np.ndarray, wobble: np.ndarray, pixels: int, size: int) -> np.ndarray:
    """Two directions of strokes, [H, W] 0-1: the first below middle tones, the second in the darks."""
    period = pixels * max(0.018, 2.2 / size)
    down, across = np.mgrid[0:pixels, 0:pixels].astype(np.float32)
    first = ((across + down) * 0.7071 / period + 0.25 * wobble) % 1.0
    second = ((across - down) * 0.7071 / period + 0.25 * wobble) % 1.0
    strokes = (first < np.clip((0.56 - tone) * 0.9, 0.0, 0.42)) | (second < np.clip((0.26 - tone) * 1.8, 0.0, 0.45))
    return strokes.astype(np.float32)


def _wobble(scene: Scene, pixels: int) -> np.ndarray:
    """Smooth noise [H, W], about -2 to 2, for an unsteady hand."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, 2]))
    coarse = Image.fromarray(rng.standard_normal((20, 20)).astype(np.float32))
    return np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BILINEAR))
