"""From a species and a scene to a picture."""

from zlib import crc32

import numpy as np
from PIL import Image

from .plate import paint_plate
from .scene import Scene, sample_scene
from .species import Species
from .styles import PAINTERS, STYLES


def draw(species: Species, scene: Scene, style: str = "natural", size: int = 64) -> Image.Image:
    """The picture of `species` in `scene`, RGB, `size` pixels squared (32-512).

    The same arguments give the same pixels everywhere.

    Raises:
        ValueError: unknown style, or a size outside 32-512.
    """
    if style not in PAINTERS:
        raise ValueError(f"style is {style!r}, expected one of {', '.join(STYLES)}")
    if not 32 <= size <= 512:
        raise ValueError(f"size is {size} pixels, expected 32 to 512")
    return PAINTERS[style](species, scene, size)


def silhouette(species: Species, scene: Scene, size: int = 64) -> Image.Image:
    """Where the bird of `draw` is seen: L, 255 inside, `size` pixels squared; what covers the bird is left out."""
    factor = 3
    ground = Image.new("RGB", (size * factor, size * factor))
    return paint_plate(species, scene, ground).bird.reduce(factor)


def picture(
    species: Species, seed: int, difficulty: float = 0.5, style: str = "natural", size: int = 64
) -> Image.Image:
    """Picture number `seed` of `species`: its scene is sampled from the seed and the species' name."""
    return draw(species, seeded_scene(species, seed, difficulty), style, size)


def seeded_scene(species: Species, seed: int, difficulty: float) -> Scene:
    """The scene of `picture`, for its caption."""
    # The name goes in by CRC: Python's own hash differs from run to run.
    entropy = [crc32(species.name.encode()), seed]
    return sample_scene(species, np.random.Generator(np.random.PCG64(entropy)), difficulty)
