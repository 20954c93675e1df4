"""Field marks of wings and tail.

A wing mark has one shape on the folded and one on the spread wing, both on its (u, v) surface; a tail mark lies in
the tail's frame.
"""

import numpy as np

from .anatomy import Anatomy, Wing
from .colour import RGB
from .curves import step
from .patch import Painter, Patch
from .species import Mark


def wing_bars(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    wing = anatomy.near_wing
    patches = []
    for bar in range(mark.count):
        if wing.spread:
            v = 0.58 - 0.2 * bar
            line = [(0.04, v), (0.25, v - 0.03), (0.5, v - 0.08)]
        else:
            u = 0.43 - 0.2 * bar
            line = [(u - 0.02, 0.25), (u + 0.02, 0.5), (u - 0.03, 0.92)]
        patches.append(Patch(wing.at(line), mark.colour, 0.05 * mark.size))
    return patches


def on_wing(folded: list[tuple[float, float]], spread: list[tuple[float, float]]) -> Painter:
    """A patch with one shape on the folded and one on the spread wing; size scales it about its middle."""

    def paint(anatomy: Anatomy, mark: Mark) -> list[Patch]:
        points = np.array(spread if anatomy.near_wing.spread else folded)
        middle = points.mean(axis=0)
        return [Patch(anatomy.near_wing.at(middle + (points - middle) * mark.size), mark.colour)]

    return paint


def speculum(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """A duck's bright secondaries between two pale lines."""
    wing = anatomy.near_wing
    if wing.spread:
        patch, pale = (
            [(0.04, 0.66), (0.45, 0.6), (0.45, 0.92), (0.04, 0.98)],
            [(0.04, 0.58), (0.45, 0.52), (0.45, 1.0), (0.04, 1.06)],
        )
    else:
        patch, pale = (
            [(0.46, 0.62), (0.66, 0.6), (0.64, 0.98), (0.5, 1.0)],
            [(0.42, 0.62), (0.71, 0.58), (0.69, 1.0), (0.46, 1.0)],
        )
    return [Patch(wing.at(pale), (238, 238, 234)), Patch(wing.at(patch), mark.colour)]


def wing_spots(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """Pale dots in rows, as a downy woodpecker has them."""
    patches = []
    for row in range(4):
        for column in range(mark.count):
            u = 0.3 + 0.6 * column / max(mark.count - 1, 1) + 0.04 * (row % 2)
            v = 0.28 + 0.2 * row
            patches.append(Patch(anatomy.near_wing.at([(u, v), (u + 0.05, v)]), mark.colour, 0.035 * mark.size))
    return patches


def wing_edges(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """Pale fringes along the flight feathers."""
    wing = anatomy.near_wing
    if wing.spread:
        lines = [[(u, 0.5), (u + 0.03, 1.0)] for u in np.linspace(0.08, 0.85, 8)]
    else:
        lines = [[(0.42, v), (0.7, v + 0.03), (0.92, v)] for v in (0.3, 0.45, 0.6, 0.75, 0.9)]
    return [Patch(wing.at(line), mark.colour, 0.018 * mark.size) for line in lines]


def tail_band(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    places = np.linspace(0.35, 0.9, mark.count) if mark.count > 1 else [0.8]
    shape = np.array([(0.03, -1.8), (0.05, 0.0), (0.03, 1.8)])
    return [Patch(anatomy.tail.at(shape + step(x - 0.04, 0.0)), mark.colour, 0.045 * mark.size) for x in places]


def tail_tip(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    start = 1.0 - 0.14 * mark.size
    return [Patch(anatomy.tail.at([(start, -2), (1.2, -2), (1.2, 2), (start, 2)]), mark.colour)]


def outer_tail(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    inner = 1.0 - 0.42 * mark.size
    start = 0.25
    low = [(start, inner), (1.1, inner), (1.1, 2.0), (start, 2.0)]
    return [Patch(anatomy.tail.at(low), mark.colour), Patch(anatomy.tail.at(np.array(low) * (1, -1)), mark.colour)]


def feathers(wing: Wing, colour: RGB, width: float) -> list[Patch]:
    """Lines between the flight feathers and the edges of the coverts."""
    if wing.spread:
        lines = [[(u, 0.48), (min(u + 0.05, 1.0), 1.05)] for u in np.linspace(0.06, 0.92, 11)]
        lines += [[(0.0, 0.5), (0.3, 0.46), (0.6, 0.42), (0.85, 0.5)]]
    else:
        lines = [[(0.4, v), (0.7, v + 0.02), (1.0, 0.5)] for v in (0.2, 0.38, 0.55, 0.72, 0.88)]
        lines += [[(0.38, 0.1), (0.42, 0.5), (0.36, 0.95)], [(0.2, 0.2), (0.24, 0.5), (0.2, 0.9)]]
    return [Patch(wing.at(line), colour, width) for line in lines]


WINGS: dict[str, Painter] = {
    "wing_bars": wing_bars,
    "speculum": speculum,
    "wing_spots": wing_spots,
    "wing_edges": wing_edges,
    "wing_patch": on_wing(
        [(0.5, 0.45), (0.72, 0.5), (0.7, 0.9), (0.5, 0.95)], [(0.42, 0.35), (0.62, 0.38), (0.6, 0.75), (0.42, 0.7)]
    ),
    "shoulder": on_wing(
        [(0.0, 0.2), (0.2, 0.3), (0.28, 0.6), (0.22, 1.0), (0.0, 1.0)],
        [(0.0, -0.1), (0.45, -0.1), (0.4, 0.3), (0.0, 0.35)],
    ),
    "secondaries": on_wing(
        [(0.36, 0.02), (0.78, 0.0), (0.8, 0.5), (0.6, 0.78), (0.36, 0.8)],
        [(0.0, 0.5), (0.5, 0.45), (0.52, 1.1), (0.0, 1.2)],
    ),
    "primaries": on_wing(
        [(0.72, -0.2), (1.0, -0.2), (1.0, 1.2), (0.66, 1.2)], [(0.58, 0.0), (1.0, -0.3), (1.0, 1.3), (0.62, 1.3)]
    ),
    "wing_line": on_wing(
        [(0.3, 0.8), (0.6, 0.86), (0.9, 0.9), (0.9, 1.1), (0.3, 1.1)],
        [(0.0, 0.9), (0.5, 0.88), (0.9, 0.85), (0.9, 1.2), (0.0, 1.2)],
    ),
}
TAILS: dict[str, Painter] = {"tail_band": tail_band, "tail_tip": tail_tip, "outer_tail": outer_tail}
