"""What lies behind, out of focus: three colours from top to bottom and blotches of others between them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .colour import RGB
from .scene import Scene


@dataclass(frozen=True)
class Backdrop:
    top: RGB
    middle: RGB
    bottom: RGB
    blotches: tuple[RGB, RGB]
    cells: tuple[int, int]  # blotches across and down
    strength: float  # of the blotches, 0-1


BACKDROPS = {
    "branch": Backdrop((176, 194, 140), (122, 158, 92), (84, 116, 66), ((222, 230, 190), (52, 84, 48)), (6, 6), 0.8),
    "sky": Backdrop((112, 164, 222), (158, 196, 234), (206, 224, 238), ((246, 248, 250), (96, 146, 208)), (4, 6), 0.6),
    "water": Backdrop((150, 172, 178), (108, 142, 160), (84, 118, 140), ((190, 206, 208), (62, 92, 104)), (3, 14), 0.6),
    "meadow": Backdrop((196, 212, 190), (146, 172, 92), (112, 142, 62), ((206, 200, 120), (84, 116, 52)), (9, 5), 0.6),
    "snow": Backdrop(
        (198, 208, 222), (224, 230, 238), (240, 243, 247), ((172, 184, 200), (250, 251, 252)), (5, 5), 0.5
    ),
    "reeds": Backdrop((196, 190, 150), (170, 158, 104), (122, 124, 92), ((222, 208, 150), (106, 98, 58)), (16, 3), 0.7),
    "trunk": Backdrop((156, 170, 124), (112, 134, 86), (86, 98, 66), ((210, 214, 176), (56, 68, 46)), (6, 4), 0.8),
    "feeder": Backdrop((190, 206, 176), (140, 172, 122), (110, 148, 92), ((228, 206, 200), (74, 104, 70)), (5, 5), 0.7),
    "rock": Backdrop((170, 190, 204), (146, 170, 186), (126, 148, 160), ((206, 216, 222), (96, 120, 136)), (4, 7), 0.5),
    "wire": Backdrop(
        (146, 184, 224), (186, 206, 226), (214, 218, 212), ((240, 240, 236), (120, 164, 212)), (4, 5), 0.5
    ),
    "flowers": Backdrop((150, 186, 126), (112, 156, 92), (86, 124, 70), ((214, 120, 140), (60, 96, 56)), (7, 7), 0.7),
}
_GRID = 24
_PALE = np.array((232, 232, 222), dtype=np.float64)


def backdrop_image(scene: Scene, pixels: int) -> Image.Image:
    """An RGB image of `pixels` squared; little clutter is paler and calmer, as on a plate."""
    row, clutter = BACKDROPS[scene.backdrop], scene.clutter
    rng = np.random.Generator(np.random.PCG64([scene.seed, 1]))
    height = np.linspace(0.0, 1.0, _GRID)
    stops = np.array([row.top, row.middle, row.bottom], dtype=np.float64)
    column = np.stack([np.interp(height, (0.0, 0.5, 1.0), stops[:, channel]) for channel in range(3)], axis=1)
    field = np.repeat(column[:, None], _GRID, axis=1)
    for colour in row.blotches:
        weight = np.clip(_noise(row.cells, rng) - 0.25, 0.0, 1.0) * row.strength * (0.3 + 0.7 * clutter)
        field += (np.array(colour) - field) * weight[..., None]
    field += (_PALE - field) * (0.55 * max(0.0, 1.0 - 1.6 * clutter))
    # Enlarging a coarse grid smoothly is the blur of a background out of focus, at no cost.
    image = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    return image.resize((pixels, pixels), Image.Resampling.BICUBIC)


def _noise(cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise [GRID, GRID], about -1.5 to 1.5."""
    coarse = Image.fromarray(rng.standard_normal((cells[1], cells[0])).astype(np.float32))
    return np.asarray(coarse.resize((_GRID, _GRID), Image.Resampling.BICUBIC), dtype=np.float64)
