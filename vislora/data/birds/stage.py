"""Where a picture's props stand, and the three things most are made of: limbs, leaves and stems."""

from dataclasses import dataclass

import numpy as np

from .colour import RGB, lit, mix
from .curves import closed, frame, path, tube
from .patch import Patch
from .scene import Scene
from .sheet import Sheet, Stencil

BARK = (104, 84, 66)
LEAVES = ((92, 128, 58), (116, 148, 70), (74, 108, 56), (138, 156, 80))


@dataclass(frozen=True)
class Stage:
    """Where the bird is on the sheet, in sheet pixels."""

    sheet: Sheet
    scene: Scene
    rng: np.random.Generator
    pixels: int
    feet: np.ndarray  # [2, 2]
    bill_tip: np.ndarray  # [2]
    bird: np.ndarray  # [2, 2] corners of its bounding box
    body: float  # length of the body
    cm: float  # one centimetre at the bird
    forward: float  # 1 looks right, -1 left

    def shape(self, outline, colour: RGB, patches: list[Patch] = ()) -> Stencil | None:
        return self.sheet.shape([np.asarray(outline, dtype=np.float64)], colour, patches)


def limb(stage: Stage, spine: np.ndarray, radii: np.ndarray, bark: RGB) -> None:
    """A branch along `spine` [N, 2], light above and dark below."""
    light = Patch(tube(spine - (0.0, 1.0) * radii[:, None] * 0.55, radii * 0.4), lit(bark, 1.28))
    shade = Patch(tube(spine + (0.0, 1.0) * radii[:, None] * 0.7, radii * 0.4), lit(bark, 0.68))
    stage.shape(tube(spine, radii), bark, [light, shade])


def leaf(stage: Stage, point: np.ndarray, degrees: float, length: float) -> Stencil | None:
    """A leaf from `point`, two greens along its rib."""
    place = frame(point[0], point[1], degrees, length, length)
    green = LEAVES[stage.rng.integers(len(LEAVES))]
    green = lit(green, 0.8 + 0.45 * stage.rng.random())
    if stage.scene.backdrop == "snow":
        green = mix(green, (138, 98, 62), 0.85)  # last year's leaves
    half = Patch(place.at([(0.0, 0.0), (1.0, 0.0), (0.7, 0.4), (0.2, 0.4)]), lit(green, 0.84))
    return stage.shape(place.at(_LEAF), green, [half])


def stems(stage: Stage, count: int, top: float, width: float) -> list[Stencil | None]:
    """Upright reeds and grasses from the lower edge to about `top`."""
    rng, side = stage.rng, stage.pixels
    painted = []
    for _ in range(count):
        x, lean = rng.random() * side, 0.1 * rng.normal() * side
        peak = top + 0.25 * rng.random() * side
        spine = path([(x, side * 1.05), (x + lean * 0.4, (side + peak) / 2), (x + lean, peak)], 4)
        straw = mix((176, 160, 96), (104, 120, 62), rng.random())
        painted.append(stage.shape(tube(spine, np.linspace(1.0, 0.3, len(spine)) * width * side), straw))
    return painted


_LEAF = closed([(0.0, 0.0), (0.25, -0.2), (0.65, -0.2), (1.0, 0.0), (0.65, 0.2), (0.25, 0.2)], 3)
