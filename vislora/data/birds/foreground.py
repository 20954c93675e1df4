"""What belongs in front of a bird's feet, and what hides part of the bird."""

import numpy as np

from .colour import lit
from .curves import path, step, tube
from .sheet import Stencil
from .stage import BARK, LEAVES, Stage, leaf, stems


def set_foreground(stage: Stage) -> list[Stencil]:
    """Paint what belongs in front of the feet, and what hides the bird; returns what was covered."""
    painted = []
    if stage.scene.pose == "standing" and stage.scene.backdrop == "meadow":
        painted += _grass(stage)
    if stage.scene.pose == "standing" and stage.scene.backdrop == "water":
        painted += _rings(stage)
    if stage.scene.cover > 0.0:
        painted += _cover(stage)
    return [stencil for stencil in painted if stencil is not None]


def _grass(stage: Stage) -> list[Stencil | None]:
    """A few blades across the feet."""
    rng, side = stage.rng, stage.pixels
    foot, blades = stage.feet.mean(axis=0), []
    for _ in range(int(5 + 9 * stage.scene.clutter)):
        x = foot[0] + rng.normal() * 0.22 * side
        height = (0.05 + 0.07 * rng.random()) * side
        base = foot[1] + 0.05 * side
        lean = rng.normal() * 0.03 * side
        blade = path([(x, base), (x + 0.3 * lean, base - 0.6 * height), (x + lean, base - height)], 3)
        green = lit(LEAVES[rng.integers(len(LEAVES))], 0.85 + 0.4 * rng.random())
        blades.append(stage.shape(tube(blade, np.linspace(1.0, 0.2, len(blade)) * 0.008 * side), green))
    return blades


def _rings(stage: Stage) -> list[Stencil | None]:
    """Rings where the legs meet the water."""
    side = stage.pixels
    rings = []
    for foot in stage.feet:
        ring = path(
            [(foot[0] - 0.07 * side, foot[1]), (foot[0], foot[1] + 0.012 * side), (foot[0] + 0.07 * side, foot[1])], 4
        )
        rings.append(stage.shape(tube(ring, np.full(len(ring), 0.006 * side)), (206, 218, 220)))
    return rings


def _cover(stage: Stage) -> list[Stencil | None]:
    """Leaves, stems or twigs across the bird, up to about a third of it; never over the whole head."""
    rng, scene, side = stage.rng, stage.scene, stage.pixels
    if scene.backdrop in ("sky", "wire", "water") and scene.pose in ("flying", "hovering", "perched"):
        return []
    low, high = stage.bird
    extent = float((high - low).max())
    if scene.backdrop in ("reeds", "meadow", "water"):
        return stems(stage, int(2 + 6 * scene.cover), low[1] + 0.2 * extent, 0.011)
    painted = []
    centre = low + (high - low) * (0.15 + 0.7 * rng.random(), 0.35 + 0.6 * rng.random())
    twig = path(
        [
            centre + step(-0.6 * side, 0.3 * side * rng.normal()),
            centre,
            centre + step(0.6 * side, 0.3 * side * rng.normal()),
        ],
        4,
    )
    painted.append(stage.shape(tube(twig, np.full(len(twig), 0.009 * side)), lit(BARK, 0.8)))
    for _ in range(int(2 + 7 * scene.cover)):
        point = twig[rng.integers(2, 7)] * 0.6 + centre * 0.4 + rng.normal(size=2) * 0.03 * extent
        painted.append(leaf(stage, point, 360 * rng.random(), extent * (0.13 + 0.13 * rng.random())))
    return painted
