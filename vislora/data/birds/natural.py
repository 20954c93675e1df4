"""The natural style: light and shade over the plate, then what air, lens and camera do to it."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .backdrops import backdrop_image
from .plate import paint_plate
from .scene import Scene
from .species import Species


def natural(species: Species, scene: Scene, size: int) -> Image.Image:
    """A picture as a camera or a careful painter sees the scene."""
    factor = 4 if size < 48 else 3 if size < 200 else 2
    plate = paint_plate(species, scene, backdrop_image(scene, size * factor), softness=0.35 * factor * size / 64)
    picture = np.asarray(plate.image.reduce(factor), dtype=np.float32)
    bird = share(plate.bird.reduce(factor))
    wing = share(plate.wing.reduce(factor))
    light = shading(bird, wing, scene, plate.extent) * (1.0 + bird * _texture(scene, size))
    if scene.dapple:
        light = light * (1.0 + (0.4 + 0.6 * bird) * _dapple(scene, size))
    picture = picture * light[..., None]
    picture = _air(picture, bird, scene)
    picture = _lens(picture, scene, size)
    picture = grade(picture, scene)
    rng = np.random.Generator(np.random.PCG64(scene.seed ^ 0x5EED))
    if scene.noise:
        grain = rng.standard_normal((size, size, 1)) + 0.5 * rng.standard_normal((size, size, 3))
        picture += scene.noise * grain.astype(np.float32)
    if scene.compression:
        picture = _compress(picture, scene.compression)
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))


def shading(bird: np.ndarray, wing: np.ndarray, scene: Scene, extent: float) -> np.ndarray:
    """Factors [H, W] around 1: a bird is round, its folded wing lies on top and casts a shadow.

    The blurred mask serves as height; its slope against the sun's direction is the light.
    """
    size = bird.shape[0]
    wide = blurred(bird, 0.085 * extent * size)
    low = blurred(wing, 0.025 * extent * size)
    angle = np.deg2rad(scene.sun)
    towards_x, towards_y = np.cos(angle), -np.sin(angle)
    height = 1.0 * wide * extent * size * 0.16 + low * extent * size * 0.012
    down, across = np.gradient(height)
    slope = -(across * towards_x + down * towards_y)
    light = np.clip(slope, -0.34, 0.38) * scene.modelling
    shift = max(1, round(0.02 * extent * size))
    cast = np.clip(np.roll(low, shift, axis=0) - wing, 0.0, 1.0) * 0.4 * scene.modelling
    rounded = 0.90 + 0.16 * (wide - 0.6) * scene.modelling
    return 1.0 + bird * (rounded * (1.0 + light) * (1.0 - cast) - 1.0)


def _texture(scene: Scene, size: int) -> np.ndarray:
    """Faint streaky noise [H, W] along the body, as feathers catch the light."""
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    cells = min(size, 128)
    coarse = Image.fromarray(rng.standard_normal((cells // 2, cells // 6)).astype(np.float32))
    angle = 40.0 if scene.facing == "right" else -40.0
    streaks = coarse.resize((size, size), Image.Resampling.BILINEAR).rotate(angle, Image.Resampling.BILINEAR)
    return 0.035 * np.asarray(streaks)


def _dapple(scene: Scene, size: int) -> np.ndarray:
    """Spots of sun in the shade of leaves, [H, W] about -0.35 to 0.35."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, 7]))
    coarse = Image.fromarray(rng.standard_normal((9, 9)).astype(np.float32))
    spots = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return scene.dapple * 0.35 * np.tanh(spots)


def blurred(field: np.ndarray, radius: float) -> np.ndarray:
    """Two box blurs of a [H, W] float field; edges repeat."""
    reach = max(1, round(radius))
    for _ in range(2):
        field = _box(_box(field, reach).T, reach).T
    return field


def _box(field: np.ndarray, reach: int) -> np.ndarray:
    padded = np.pad(field, ((reach + 1, reach), (0, 0)), mode="edge")
    total = np.cumsum(padded, axis=0, dtype=np.float64)
    return (total[2 * reach + 1 :] - total[: -2 * reach - 1]) / (2 * reach + 1)


def share(mask: Image.Image) -> np.ndarray:
    """A mask as [H, W] float32, 0-1."""
    return np.asarray(mask, dtype=np.float32) / 255


def _air(picture: np.ndarray, bird: np.ndarray, scene: Scene) -> np.ndarray:
    if scene.light == "backlight":
        # The sky behind is bright, the side towards us lies in shade.
        picture = picture * (1.15 - 0.37 * bird[..., None])
    if scene.haze:
        picture = picture + (np.array((198, 204, 210), dtype=np.float32) - picture) * scene.haze
    return picture


def _lens(picture: np.ndarray, scene: Scene, size: int) -> np.ndarray:
    blur, streak = scene.blur * size, scene.motion * size
    if blur < 0.3 and streak < 0.8:
        return picture
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if blur >= 0.3:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if streak >= 0.8:
        image = image.filter(ImageFilter.BoxBlur((streak / 2, 0)))
    return np.asarray(image, dtype=np.float32)


def grade(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """White balance, exposure and contrast about middle grey."""
    warm, green = scene.temperature, scene.green
    balance = (1.0 + 0.26 * warm - 0.06 * green, 1.0 + 0.12 * green + 0.03 * warm, 1.0 - 0.30 * warm - 0.06 * green)
    gain = np.array(balance, dtype=np.float32) * (scene.exposure * scene.contrast)
    return picture * gain + 112.0 * (1.0 - scene.contrast) * min(scene.exposure, 1.0)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The orthonormal 8-point DCT, [8, 8]."""
    k = np.arange(8)[:, None]
    matrix = np.cos(np.pi * k * (2 * np.arange(8)[None] + 1) / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _compress(picture: np.ndarray, strength: float) -> np.ndarray:
    """Round the cosine coefficients of 8 x 8 blocks, coarser for higher frequencies, as JPEG does.

    Own arithmetic instead of a JPEG library, whose versions differ in the pixels they give.
    """
    size = picture.shape[0]
    whole = -(-size // 8) * 8
    padded = np.pad(picture, ((0, whole - size), (0, whole - size), (0, 0)), mode="edge")
    blocks = padded.reshape(whole // 8, 8, whole // 8, 8, 3).transpose(0, 2, 4, 1, 3)
    cosines = _cosines()
    frequency = np.add.outer(np.arange(8), np.arange(8)).astype(np.float32)
    step = 4.0 + strength * (6.0 + 9.0 * frequency)
    rounded = np.round(cosines @ blocks @ cosines.T / step) * step
    blocks = cosines.T @ rounded @ cosines
    return blocks.transpose(0, 3, 1, 4, 2).reshape(whole, whole, 3)[:size, :size]
