"""A species in a pose as an ordered list of painted parts, in figure coordinates (see `anatomy`)."""

from dataclasses import dataclass, field, replace

import numpy as np

from . import bills, marks
from .anatomy import (
    Anatomy,
    Wing,
    body_outline,
    crest_outline,
    head_outline,
    neck_outline,
    pose_anatomy,
    tail_outline,
)
from .colour import RGB, lit, mix
from .curves import closed, frame, oval, step, tube
from .marks import EYE
from .patch import Patch
from .scene import Scene
from .species import Mark, Species
from .wing_marks import TAILS, WINGS, feathers

_BILL_BASE = (0.84, 0.12)  # in the head's frame


@dataclass(frozen=True)
class Part:
    """A piece with one ground colour; `patches` are painted on it and clipped by its outlines' union."""

    name: str
    outlines: list[np.ndarray]
    colour: RGB
    patches: list[Patch] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    parts: list[Part]  # in painting order
    feet: np.ndarray  # [2, 2], far and near
    bill_tip: np.ndarray  # [2]
    waterline: float | None  # y, for swimming birds

    def extent(self) -> np.ndarray:
        """Corners of the bird's bounding box, [2, 2]."""
        points = np.concatenate([outline for part in self.parts for outline in part.outlines])
        return np.stack([points.min(axis=0), points.max(axis=0)])


def figure(species: Species, scene: Scene) -> Figure:
    """The bird of `scene`, looking to the right."""
    _check_words(species)
    plan = species.plan
    anatomy = pose_anatomy(plan, scene.pose, scene.tilt, scene.head_tilt, scene.looking_back, scene.beat)
    waterline = None
    parts = []
    if scene.pose == "swimming":
        waterline = float(anatomy.body.at((0.0, 0.5))[1])
    else:
        parts.append(_legs(species, anatomy))
    if anatomy.far_wing is not None:
        parts.append(_wing(species, anatomy, anatomy.far_wing, "far wing", 0.82))
    parts.append(_tail(species, anatomy))
    bill = _bill(species, anatomy, scene.looking_back) if plan.face == "side" else []
    # Over the shoulder the bill lies in front of the back, else its root goes under the head's feathers.
    parts += [_body(species, anatomy), *bill] if scene.looking_back else [*bill, _body(species, anatomy)]
    parts.append(_wing(species, anatomy, anatomy.near_wing, "wing", 1.0))
    parts += _face(species, anatomy) if plan.face == "front" else _eye(species, anatomy, EYE)
    tip = anatomy.head.at((_BILL_BASE[0] + species.bill.length, _BILL_BASE[1]))
    return Figure(parts, anatomy.feet, tip, waterline)


def _check_words(species: Species) -> None:
    """A misspelt mark or bill would silently leave the bird without it."""
    for mark in species.marks:
        if mark.kind not in marks.MARKS:
            raise ValueError(
                f"{species.name} has a mark {mark.kind!r}, expected one of {', '.join(sorted(marks.MARKS))}"
            )
    if species.bill.shape not in bills.SHAPES:
        shapes = ", ".join(bills.SHAPES)
        raise ValueError(f"{species.name} has a bill of shape {species.bill.shape!r}, expected one of {shapes}")


def _body(species: Species, anatomy: Anatomy) -> Part:
    outlines = [body_outline(anatomy), neck_outline(anatomy), head_outline(anatomy)]
    crest = crest_outline(anatomy)
    if crest is not None:
        outlines.append(crest)
    ground = marks.under(anatomy, Mark("under", species.under))
    return Part("body", outlines, species.upper, ground + marks.patches(marks.HEAD_AND_BODY, anatomy, species.marks))


def _tail(species: Species, anatomy: Anatomy) -> Part:
    line = lit(species.tail, 0.72)
    width = 0.014
    lines = [Patch(anatomy.tail.at([(0.2, y * 0.6), (1.0, y)]), line, width) for y in (-0.45, 0.0, 0.45)]
    patches = marks.patches(TAILS, anatomy, species.marks)
    return Part("tail", [tail_outline(anatomy)], species.tail, patches + lines)


def _wing(species: Species, anatomy: Anatomy, wing: Wing, name: str, light: float) -> Part:
    """A wing: coverts in front, flight feathers behind, then the marks."""
    if wing.spread:
        coverts = wing.at([(0.0, -0.3), (0.4, -0.3), (1.0, -0.3), (0.8, 0.3), (0.4, 0.45), (0.0, 0.52)])
    else:
        coverts = wing.at([(0.0, -0.1), (0.34, -0.1), (0.42, 0.5), (0.36, 1.1), (0.0, 1.1)])
    patches = [Patch(coverts, species.wing)]
    patches += feathers(wing, lit(species.flight, 0.7), 0.016)
    patches += marks.patches(WINGS, replace(anatomy, near_wing=wing), species.marks)
    if light != 1.0:
        patches = [replace(patch, colour=lit(patch.colour, light)) for patch in patches]
    return Part(name, [wing.outline], lit(species.flight, light), patches)


def _bill(species: Species, anatomy: Anatomy, looking_back: bool) -> list[Part]:
    bill = species.bill
    place = frame(*_BILL_BASE, 0.0, bill.length, bill.depth / 2).inside(anatomy.head)
    upper, lower = (np.array(shape, dtype=np.float64) for shape in bills.SHAPES[bill.shape])
    tip = [] if bill.tip is None else [Patch(place.at([(0.44, -2), (1.2, -2), (1.2, 3), (0.44, 3)]), bill.tip)]
    gape = [Patch(place.at(upper[3:]), lit(bill.upper, 0.6), 0.012)]
    parts = []
    for name, shape, colour, patches in (
        ("lower bill", lower, bill.lower, tip),
        ("upper bill", upper, bill.upper, tip + gape),
    ):
        outlines = [place.at(shape)]
        if not looking_back:
            # A root behind the base, hidden by the feathers, keeps bill and head together.
            top, bottom = shape[0, 1], shape[-1, 1]
            behind, before = -0.35 / bill.length, 0.05 / bill.length
            outlines.append(place.at([(behind, top), (before, top), (before, bottom), (behind, bottom)]))
        parts.append(Part(name, outlines, colour, patches))
    return parts


def _eye(species: Species, anatomy: Anatomy, place: tuple[float, float]) -> list[Part]:
    x, y = place
    radius = 0.155 * (0.215 / species.plan.head) ** 0.3
    ball = anatomy.head.at(oval(x, y, radius))
    pupil = anatomy.head.at(oval(x, y, radius * 0.68, count=12))
    glint = anatomy.head.at(oval(x + 0.05, y - 0.06, radius * 0.34, count=10))
    return [Part("eye", [ball], species.eye, [Patch(pupil, (14, 12, 12)), Patch(glint, (245, 245, 245))])]


def _face(species: Species, anatomy: Anatomy) -> list[Part]:
    """Two eyes and a small bill on a face that looks at the viewer."""
    bill = closed([(0.12, 0.02), (0.24, 0.18), (0.12, 0.48), (0.0, 0.18)])
    beak = Part("upper bill", [anatomy.head.at(bill)], species.bill.upper)
    return [*_eye(species, anatomy, (0.44, -0.12)), *_eye(species, anatomy, (-0.2, -0.12)), beak]


def _legs(species: Species, anatomy: Anatomy) -> Part:
    width = species.plan.leg_width
    outlines, patches = [], []
    for hip, foot, light in zip(anatomy.hips, anatomy.feet, (0.8, 1.0), strict=True):
        if anatomy.pose in ("flying", "hovering"):
            joints = np.array([hip, (hip + foot) / 2, foot])
            toes = [foot, foot + step(-0.08, 0.02)]
        elif species.plan.leg > 0.5:
            knee = hip + (foot - hip) * 0.45 + (-0.07, 0.0)
            joints = np.array([hip, knee, foot])
            toes = [foot + step(0.12, 0.02), foot, foot + step(-0.07, 0.02)]
        else:
            joints = np.array([hip, (hip + foot) / 2 + (-0.02, 0.0), foot])
            toes = [foot + step(0.1, 0.015), foot, foot + step(-0.06, 0.02)]
        outlines += [tube(joints, np.full(3, width)), tube(np.array(toes), np.full(len(toes), width * 0.8))]
        patches.append(Patch(outlines[-2], lit(species.leg, light)))
    return Part("legs", outlines, mix(species.leg, (0, 0, 0), 0.1), patches)
