"""The watercolour style: transparent washes on rough paper, wandering edges, pigment pooled along them."""

import numpy as np
from PIL import Image, ImageFilter

from .backdrops import backdrop_image
from .natural import grade, shading, share
from .plate import paint_plate
from .scene import Scene
from .species import Species

PAPER = np.array((250, 247, 239), dtype=np.float32)


def watercolour(species: Species, scene: Scene, size: int) -> Image.Image:
    """A painting whose ground fades into the paper around the bird."""
    factor = 3 if size < 48 else 2
    pixels = size * factor
    plate = paint_plate(species, scene, backdrop_image(scene, pixels), softness=0.012 * pixels)
    light = shading(share(plate.bird.reduce(factor)), share(plate.wing.reduce(factor)), scene, plate.extent)
    light = Image.fromarray((1.0 + 0.8 * (light - 1.0)).astype(np.float32)).resize((pixels, pixels))
    colours = np.asarray(plate.image, dtype=np.float32) * np.asarray(light)[..., None]
    bird = share(plate.bird)
    noise = [_noise(scene, stream, cells, pixels) for stream, cells in ((3, 18), (4, 18), (5, 7))]
    colours, bird = _wander(colours, bird, noise[0], noise[1], 0.006 * pixels)
    colours = grade(colours, scene)
    pigment = np.clip(PAPER - colours, 0, 255)  # what the paint takes from the paper's light
    pigment = _pool(pigment, pixels)
    pigment *= _density(bird, noise[2], scene, pixels)[..., None]
    # Grains settle in the paper's hollows; a heavy wash covers them.
    grain = _noise(scene, 6, pixels // 2, pixels)[..., None]
    pigment *= 1.0 + grain * (0.1 - 0.00032 * pigment)
    picture = np.clip(PAPER - pigment + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(picture).reduce(factor)


def _wander(colours: np.ndarray, bird: np.ndarray, right: np.ndarray, down: np.ndarray, reach: float):
    """Move every pixel by smooth noise, so that edges tremble and colours bleed over them."""
    pixels = len(bird)
    index = np.arange(pixels)
    row = np.clip(index[:, None] + np.rint(down * reach).astype(np.int64), 0, pixels - 1)
    column = np.clip(index[None] + np.rint(right * reach).astype(np.int64), 0, pixels - 1)
    return colours[row, column], bird[row, column]


def _pool(pigment: np.ndarray, pixels: int) -> np.ndarray:
    """More pigment just inside the edge of a darker wash."""
    image = Image.fromarray(np.clip(pigment, 0, 255).astype(np.uint8))
    around = np.asarray(image.filter(ImageFilter.BoxBlur(0.014 * pixels)), dtype=np.float32)
    return pigment * 0.9 + 0.75 * np.maximum(pigment - around, 0.0)


def _density(bird: np.ndarray, noise: np.ndarray, scene: Scene, pixels: int) -> np.ndarray:
    """How much paint there is, [H, W]: full on the bird, uneven around it, none towards the edges of the sheet."""
    place = np.linspace(0.0, 1.0, pixels, dtype=np.float32)
    across, down = (place - 0.5 * (0.5 + scene.x)) * 2.0, (place - 0.5 * (0.5 + scene.y)) * 2.0
    away = np.sqrt(across[None] ** 2 * 0.9 + down[:, None] ** 2)
    ground = np.clip((1.05 + 0.16 * noise - away) * 4.0, 0.0, 1.0) * (0.72 + 0.12 * noise)
    body = 0.96 + 0.07 * noise
    return ground + (body - ground) * bird


def _noise(scene: Scene, stream: int, cells: int, pixels: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([scene.seed, stream]))
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC))
