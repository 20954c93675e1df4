"""The flat style: clean shapes, two tones, a poster's ground."""

import numpy as np
from PIL import Image, ImageDraw

from .backdrops import BACKDROPS
from .colour import lit, mix
from .curves import oval, path
from .natural import grade, shading, share
from .plate import paint_plate
from .scene import Scene
from .species import Species

SHADE = 0.8


def flat(species: Species, scene: Scene, size: int) -> Image.Image:
    """A flat vector picture: every shape in one colour and its shade."""
    factor = 4 if size < 48 else 3 if size < 200 else 2
    plate = paint_plate(species, scene, _poster(scene, size * factor))
    picture = np.asarray(plate.image, dtype=np.float32)
    picture = picture * two_tones(plate.bird, plate.wing, scene, plate.extent, factor)[..., None]
    picture = grade(picture, scene)
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8)).reduce(factor)


def two_tones(bird: Image.Image, wing: Image.Image, scene: Scene, extent: float, factor: int) -> np.ndarray:
    """Light (1) and shade (SHADE) with a hard edge between them, [H, W] of the masks' size.

    The smooth light is found at 1 / `factor` of the size, where it costs little, and enlarged.
    """
    smooth = shading(share(bird.reduce(factor)), share(wing.reduce(factor)), scene, extent)
    smooth = Image.fromarray(smooth.astype(np.float32)).resize(bird.size, Image.Resampling.BICUBIC)
    dark = (np.asarray(smooth) < 0.86) & (np.asarray(bird) > 127)
    return np.where(dark, np.float32(SHADE), np.float32(1.0))


def _poster(scene: Scene, pixels: int) -> Image.Image:
    """One colour, a pale disc, and a hill or clouds."""
    row = BACKDROPS[scene.backdrop]
    rng = np.random.Generator(np.random.PCG64([scene.seed, 1]))
    ground = Image.new("RGB", (pixels, pixels), mix(row.middle, (250, 246, 236), 0.35))
    pen = ImageDraw.Draw(ground)
    disc = oval(0.2 + 0.6 * rng.random(), 0.2 + 0.3 * rng.random(), 0.2 + 0.12 * rng.random(), count=48)
    pen.polygon((disc * pixels).ravel().tolist(), fill=mix(row.blotches[0], (255, 250, 240), 0.4))
    if scene.backdrop in ("sky", "wire"):
        for _ in range(3):
            x, y = rng.random(2)
            for shift, radius in ((-0.09, 0.05), (0.0, 0.075), (0.1, 0.055)):
                puff = oval(x + shift, y, radius * 1.3, radius * 0.7, 32)
                pen.polygon((puff * pixels).ravel().tolist(), fill=(246, 247, 246))
    else:
        for depth, light in ((0.66, 1.06), (0.82, 0.94)):
            level = depth + 0.1 * (rng.random(4) - 0.5)
            ridge = path(np.stack([(-0.05, 0.3, 0.7, 1.05), level], axis=1), 10)
            hill = np.concatenate([ridge, [(1.05, 1.05), (-0.05, 1.05)]])
            pen.polygon((hill * pixels).ravel().tolist(), fill=lit(mix(row.bottom, row.middle, 0.3), light))
    return ground
