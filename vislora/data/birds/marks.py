"""Field marks: each row of MARKS turns a mark into coloured patches on one part of an anatomy.

A mark paints freely; the part's outline clips it. Head marks use the head's frame (bill base at x = 1, eye at
EYE), body marks the body's; those of wing and tail are in `wing_marks`.
"""

import numpy as np

from .anatomy import Anatomy
from .colour import lit, mix
from .curves import closed, oval, step
from .patch import Painter, Patch
from .species import Mark
from .wing_marks import TAILS, WINGS

EYE = (0.36, -0.14)


def on_head(*points: tuple[float, float]) -> Painter:
    """A smooth patch of fixed shape on the head; the mark's size scales it about its own middle."""
    curve = closed(points)
    middle = curve.mean(axis=0)

    def paint(anatomy: Anatomy, mark: Mark) -> list[Patch]:
        return [Patch(anatomy.head.at(middle + (curve - middle) * mark.size), mark.colour)]

    return paint


def on_body(*points: tuple[float, float]) -> Painter:
    curve = closed(points)
    middle = curve.mean(axis=0)

    def paint(anatomy: Anatomy, mark: Mark) -> list[Patch]:
        return [Patch(anatomy.body.at(middle + (curve - middle) * mark.size), mark.colour)]

    return paint


def under(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """The whole underside, throat included."""
    belly = closed(
        [(1.3, -0.5), (0.75, -0.12), (0.3, 0.2), (-0.5, 0.3), (-1.15, 0.1), (-1.3, 1.4), (0.2, 1.5), (1.4, 1.2)]
    )
    chin = closed([(1.1, 0.28), (0.55, 0.42), (0.0, 0.62), (-0.2, 1.3), (0.9, 1.4)])
    return [
        Patch(anatomy.body.at(belly), mark.colour),
        Patch(anatomy.neck(0.0, 1.0, 0.25, 1.2), mark.colour),
        Patch(anatomy.head.at(chin), mark.colour),
    ]


def breast(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    reach = mark.size
    front = closed([(1.3, -0.75), (0.72, -0.35), (0.62 - 0.5 * reach, 0.35), (0.75 - 0.95 * reach, 1.25), (1.3, 1.3)])
    return [Patch(anatomy.body.at(front), mark.colour), Patch(anatomy.neck(0.0, 0.6, 0.15, 1.2), mark.colour)]


def throat(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    chin = closed([(1.15, 0.2), (0.62, 0.34), (0.18, 0.62), (-0.1, 1.5), (1.0, 1.5)])
    low = max(0.0, 1.0 - 0.62 * mark.size)
    return [Patch(anatomy.head.at(chin), mark.colour), Patch(anatomy.neck(low, 1.0, 0.32, 1.2), mark.colour)]


def gorget(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """An iridescent throat: dark where it turns away, flashing in the middle."""
    dark, bright = lit(mark.colour, 0.55), mix(mark.colour, (255, 190, 160), 0.35)
    flash = closed([(0.75, 0.5), (0.3, 0.6), (0.1, 0.95), (0.6, 1.0)])
    return [
        *throat(anatomy, Mark("throat", dark, mark.size * 1.08)),
        *throat(anatomy, Mark("throat", mark.colour, mark.size)),
        Patch(anatomy.head.at(flash), bright),
    ]


def hood(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """Head and neck as far down as `size` says."""
    crown = anatomy.head.at(oval(0.0, -0.5, 2.2, 1.7))
    return [Patch(anatomy.neck(max(0.0, 1.0 - mark.size), 1.0, -1.25, 1.25), mark.colour), Patch(crown, mark.colour)]


def collar(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    return [Patch(anatomy.neck(0.1, 0.1 + 0.14 * mark.size, -1.2, 1.2), mark.colour)]


def breast_band(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    width = 0.16 * mark.size
    band = closed(
        [(0.62, -0.4), (0.95, -0.3), (1.1, 0.3), (0.75, 1.1), (0.72 - width * 2, 1.0), (0.9 - width * 2, 0.2)]
    )
    return [Patch(anatomy.body.at(band), mark.colour)]


def eye_ring(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    return [Patch(anatomy.head.at(oval(*EYE, 0.25 * mark.size)), mark.colour)]


def streaks(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """Short strokes along the breast and flanks, in staggered rows."""
    patches = []
    for x, y in _scatter(mark.count):
        start = (x + 0.1, y - 0.04)
        end = (x - 0.12, y + 0.05)
        patches.append(Patch(anatomy.body.at([start, end]), mark.colour, 0.03 * mark.size))
    return patches


def spots(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    radius = 0.045 * mark.size
    return [Patch(anatomy.body.at(oval(x, y, radius, radius * 1.8, 8)), mark.colour) for x, y in _scatter(mark.count)]


def bars(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """Barring across the flanks and belly."""
    places = np.linspace(0.7, -0.75, mark.count)
    shape = np.array([(0.06, 0.25), (0.0, 0.65), (-0.08, 1.1)])
    return [Patch(anatomy.body.at(shape + step(x, 0.0)), mark.colour, 0.03 * mark.size) for x in places]


def disc(anatomy: Anatomy, mark: Mark) -> list[Patch]:
    """A barn owl's heart-shaped face, with its darker rim."""
    heart = closed(
        [
            (0.12, -0.52),
            (0.5, -0.78),
            (0.88, -0.35),
            (0.72, 0.35),
            (0.12, 0.86),
            (-0.48, 0.35),
            (-0.64, -0.35),
            (-0.26, -0.78),
        ]
    )
    middle = np.array((0.12, 0.0))
    rim = mix(mark.colour, (120, 74, 38), 0.75)
    ridge = np.array([(0.12, -0.5), (0.12, 0.2)])
    shadow = mix(mark.colour, (150, 110, 80), 0.4)
    return [
        Patch(anatomy.head.at(middle + (heart - middle) * 1.13), rim),
        Patch(anatomy.head.at(heart), mark.colour),
        Patch(anatomy.head.at(ridge), shadow, 0.02),
    ]


def _scatter(count: int) -> np.ndarray:
    """`count` places on breast and flanks, the same for every bird: a low-discrepancy sequence, no draw."""
    index = np.arange(1, count + 1)
    x = 0.92 - 1.35 * ((index * 0.7548776662) % 1.0)
    y = 0.02 + 0.8 * ((index * 0.5698402910) % 1.0) + 0.12 * (x < 0.5)
    return np.stack([x, y], axis=1)


HEAD_AND_BODY: dict[str, Painter] = {
    "under": under,
    "breast": breast,
    "throat": throat,
    "gorget": gorget,
    "hood": hood,
    "collar": collar,
    "breast_band": breast_band,
    "eye_ring": eye_ring,
    "streaks": streaks,
    "spots": spots,
    "bars": bars,
    "disc": disc,
    "cap": on_head(
        (1.2, -0.22), (0.4, -0.3), (-0.5, -0.28), (-1.3, 0.0), (-1.9, -1.2), (-1.2, -2.8), (0.4, -2.4), (1.3, -1.2)
    ),
    "crown": on_head((1.1, -0.3), (0.4, -0.42), (-0.4, -0.46), (-1.1, -0.6), (-0.7, -1.6), (0.6, -1.5)),
    "forehead": on_head((1.2, -0.1), (0.72, -0.22), (0.32, -0.5), (0.1, -1.2), (0.9, -1.2)),
    "nape": on_head((-0.55, -0.95), (-0.5, -0.2), (-0.62, 0.5), (-0.8, 1.1), (-1.6, 1.0), (-1.6, -0.6)),
    "nape_spot": on_head((-0.45, -1.0), (-0.42, -0.62), (-0.75, -0.3), (-1.3, -0.3), (-1.1, -1.1)),
    "face": on_head((1.25, -0.45), (0.78, -0.4), (0.5, 0.05), (0.38, 0.6), (0.5, 1.2), (1.2, 1.0)),
    "mask": on_head(
        (1.2, -0.15), (0.7, -0.34), (0.3, -0.4), (-0.3, -0.34), (-0.85, -0.1), (-0.3, 0.2), (0.4, 0.2), (0.9, 0.22)
    ),
    "eye_line": on_head((1.1, -0.02), (0.5, -0.22), (-0.2, -0.2), (-0.95, 0.0), (-0.2, 0.02), (0.5, -0.02)),
    "supercilium": on_head((1.0, -0.22), (0.5, -0.5), (-0.1, -0.52), (-0.95, -0.28), (-0.1, -0.3), (0.5, -0.3)),
    "cheek": on_head((0.45, 0.1), (0.1, -0.12), (-0.5, 0.0), (-0.72, 0.4), (-0.3, 0.72), (0.25, 0.55)),
    "ear": on_head((-0.1, -0.12), (-0.5, 0.0), (-0.62, 0.35), (-0.3, 0.45), (0.05, 0.2)),
    "lore": on_head((1.1, -0.12), (0.55, -0.2), (0.5, 0.02), (1.0, 0.16)),
    "malar": on_head((0.95, 0.3), (0.45, 0.42), (-0.3, 0.75), (-0.55, 1.0), (0.0, 0.92), (0.6, 0.62)),
    "moustache": on_head((0.95, 0.22), (0.4, 0.26), (-0.3, 0.45), (-0.6, 0.6), (-0.2, 0.6), (0.5, 0.42)),
    "back": on_body((0.9, -1.3), (0.62, -0.5), (0.0, -0.3), (-0.7, -0.25), (-1.0, -0.6), (-0.5, -1.5)),
    "rump": on_body((-0.42, -1.1), (-0.5, -0.4), (-0.85, 0.2), (-1.3, 0.1), (-1.2, -0.9)),
    "belly": on_body((0.35, 0.45), (-0.3, 0.35), (-0.9, 0.2), (-1.1, 1.0), (-0.2, 1.5), (0.5, 1.3)),
    "flanks": on_body((0.55, 0.2), (0.0, 0.3), (-0.7, 0.15), (-0.85, 0.45), (-0.2, 0.85), (0.45, 0.75)),
    "undertail": on_body((-0.55, 0.4), (-0.8, 0.15), (-1.3, 0.0), (-1.2, 1.1), (-0.6, 1.2)),
    "breast_spot": on_body((0.86, 0.28), (0.7, 0.15), (0.58, 0.36), (0.7, 0.55)),
    "gape": on_head((0.95, 0.3), (0.72, 0.28), (0.66, 0.5), (0.8, 0.62), (1.0, 0.55)),
    "breast_side": on_body((0.78, -0.35), (0.55, -0.2), (0.45, 0.35), (0.66, 0.4), (0.85, 0.0)),
}
MARKS = {**HEAD_AND_BODY, **WINGS, **TAILS}


def patches(table: dict[str, Painter], anatomy: Anatomy, marks: tuple[Mark, ...]) -> list[Patch]:
    """The patches of those `marks` that belong to `table`, in order."""
    return [patch for mark in marks if mark.kind in table for patch in table[mark.kind](anatomy, mark)]
