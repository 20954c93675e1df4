"""Where a bird's parts lie in a pose: frames for head, body and tail, the neck's spine and the wings' surfaces.

The bird looks to the right. Its body is one unit long and centred on the origin; y points down the page.
"""

from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np

from .curves import Frame, closed, frame, normals, path, step, tube
from .species import Plan


@dataclass(frozen=True)
class Posture:
    """How one pose holds a body: angles in degrees above the horizontal, lengths in body lengths."""

    tilt: float
    neck_rise: float
    neck_reach: float = 1.0  # share of the plan's neck that is stretched out
    tail_drop: float = 0.0  # tail below the line of the back
    tail_spread: float = 1.0


@dataclass(frozen=True)
class Wing:
    """A wing between its upper/leading edge and lower/trailing edge, from shoulder (u = 0) to tip (u = 1)."""

    leading: np.ndarray  # [N, 2]
    trailing: np.ndarray  # [N, 2]
    outline: np.ndarray  # [M, 2]
    spread: bool

    def at(self, points) -> np.ndarray:
        """Points (u, v), v = 0 on the leading edge and 1 on the trailing edge, as figure coordinates [N, 2]."""
        points = np.asarray(points, dtype=np.float64)
        place = np.clip(points[:, 0], 0.0, 1.0) * (len(self.leading) - 1)
        before = np.minimum(place.astype(int), len(self.leading) - 2)
        share = (place - before)[:, None]
        lead = self.leading[before] * (1 - share) + self.leading[before + 1] * share
        trail = self.trailing[before] * (1 - share) + self.trailing[before + 1] * share
        return lead + (trail - lead) * points[:, 1:2]


@dataclass(frozen=True)
class Anatomy:
    """All places of one bird in one pose, in figure coordinates."""

    plan: Plan
    pose: str
    body: Frame  # x from rump (-1) to breast (1), y from back (-1) to belly (1)
    head: Frame  # one unit is the head's radius, x towards the bill
    tail: Frame  # x from root (0) to tip (1), y across from -1 to 1
    spine: np.ndarray  # [N, 2], shoulder to head
    radii: np.ndarray  # [N]
    near_wing: Wing
    far_wing: Wing | None
    hips: np.ndarray  # [2, 2], far and near
    feet: np.ndarray  # [2, 2], far and near

    def neck(self, start: float, end: float, low: float = -1.0, high: float = 1.0) -> np.ndarray:
        """The part of the neck from `start` to `end` (0 shoulder, 1 head), across from `low` (back) to `high`."""
        count = len(self.spine)
        steps = np.linspace(start, end, 6) * (count - 1)
        index = np.arange(count)
        across = normals(self.spine) * self.radii[:, None]
        centre = np.stack([np.interp(steps, index, self.spine[:, axis]) for axis in (0, 1)], axis=1)
        side = np.stack([np.interp(steps, index, across[:, axis]) for axis in (0, 1)], axis=1)
        return np.concatenate([centre + side * high, (centre + side * low)[::-1]])


def pose_anatomy(plan: Plan, pose: str, tilt: float, head_tilt: float, looking_back: bool, beat: float) -> Anatomy:
    """Lay out `plan` in `pose`.

    Args:
        tilt: degrees added to the pose's own body angle.
        head_tilt: degrees the bill points above the horizontal.
        looking_back: the head is turned over the shoulder.
        beat: wing beat of a flying bird, -1 (down) to 1 (up).
    """
    posture = _posture(plan, pose)
    angle = posture.tilt + tilt
    body = frame(0.0, 0.0, angle, 0.5, plan.depth / 2)
    head, spine, radii = _neck_and_head(plan, pose, posture, body, tilt, head_tilt, looking_back)
    root = body.at((-0.82, -0.12))
    tail = frame(root[0], root[1], angle + 180.0 + posture.tail_drop, plan.tail + 0.1, 1.0)
    half_width = plan.tail_width * posture.tail_spread
    tail = Frame(np.stack([tail.axes[:, 0], -tail.axes[:, 1] * half_width], axis=1), tail.origin)
    hips, feet = _legs(plan, pose, body)
    if pose in ("flying", "hovering"):
        near, far = _spread_wings(plan, pose, body, angle, beat)
    else:
        near, far = _folded_wing(plan, body), None
    return Anatomy(plan, pose, body, head, tail, spine, radii, near, far, hips, feet)


def _posture(plan: Plan, pose: str) -> Posture:
    long_neck = plan.neck > 0.6
    match pose:
        case "perched":
            return Posture(plan.upright, 78.0 if long_neck else 40.0 + 0.5 * plan.upright, tail_drop=4.0)
        case "standing":
            return Posture(plan.stance, 74.0 if long_neck else 40.0 + 0.6 * plan.stance, tail_drop=-3.0)
        case "clinging":
            return Posture(74.0, 88.0, tail_drop=16.0)
        case "swimming":
            return Posture(3.0, 66.0, tail_drop=-10.0)
        case "flying":
            # Herons fly with the neck folded, everything else with it stretched forward.
            reach = 0.42 if plan.neck_bend > 0.5 else 1.0
            return Posture(7.0, 20.0, neck_reach=reach, tail_spread=1.7)
        case "hovering":
            return Posture(48.0, 66.0, tail_drop=14.0, tail_spread=1.3)
    raise ValueError(f"no posture for pose {pose!r}")


def _neck_and_head(plan, pose, posture, body, tilt, head_tilt, looking_back):
    shoulder = body.at((0.55, -0.22))
    reach = plan.neck * posture.neck_reach
    rise = radians(posture.neck_rise + 0.6 * tilt)
    centre = shoulder + reach * np.array([cos(rise), -sin(rise)])
    bend = plan.neck_bend * plan.neck * (0.75 if posture.neck_reach < 1.0 else 0.55)
    sag = 0.35 * plan.neck if posture.neck_reach < 1.0 else 0.0
    first = shoulder + 0.33 * (centre - shoulder) + (bend, sag)
    second = shoulder + 0.67 * (centre - shoulder) + (-0.8 * bend, 0.3 * sag)
    t = np.linspace(0.0, 1.0, 10)[:, None]
    spine = (1 - t) ** 3 * shoulder + 3 * t * (1 - t) ** 2 * first + 3 * t**2 * (1 - t) * second + t**3 * centre
    base, top = 0.78 * plan.depth / 2, 0.92 * plan.head
    middle = max(2 * plan.neck_width - (base + top) / 2, 0.5 * plan.neck_width)
    t = t[:, 0]
    radii = (1 - t) ** 2 * base + 2 * t * (1 - t) * middle + t**2 * top
    length = plan.head_shape**0.5
    head = frame(centre[0], centre[1], head_tilt, plan.head * length, plan.head / length)
    if looking_back:
        head = Frame(head.axes * (-1.0, 1.0), head.origin)
    return head, spine, radii


def head_outline(anatomy: Anatomy) -> np.ndarray:
    return anatomy.head.at(_HEAD)


def body_outline(anatomy: Anatomy) -> np.ndarray:
    return anatomy.body.at(_BODY)


def neck_outline(anatomy: Anatomy) -> np.ndarray:
    return tube(anatomy.spine, anatomy.radii)


def tail_outline(anatomy: Anatomy) -> np.ndarray:
    return anatomy.tail.at(_TAILS[anatomy.plan.tail_shape])


def crest_outline(anatomy: Anatomy) -> np.ndarray | None:
    """The crest, or None where the plan has none."""
    length = anatomy.plan.crest_length
    match anatomy.plan.crest:
        case "peak":
            tip = (-0.75 - 0.35 * length, -0.7 - 0.75 * length)
            back = (-0.95, -0.35 - 0.25 * length)
            points = [
                (0.85, -0.3),
                (0.45, -0.85 - 0.1 * length),
                (-0.1, -0.95 - 0.42 * length),
                tip,
                back,
                (-0.9, 0.25),
            ]
        case "tuft":
            # Ragged: its feathers stand apart, so no curve is drawn through them.
            points = [(0.7, -0.4), (0.2, -0.95 - 0.3 * length), (0.0, -0.92 - 0.2 * length)]
            points += [(-0.45, -0.95 - 0.42 * length), (-0.55, -0.85 - 0.2 * length)]
            points += [(-0.95 - 0.2 * length, -0.75 - 0.25 * length), (-0.85, -0.45), (-0.6, 0.0)]
            return anatomy.head.at(points)
        case "plume":
            points = [(0.1, -0.85), (-0.7, -0.75), (-1.1 - 0.9 * length, -0.2), (-0.8, -0.3), (-0.5, -0.2)]
        case _:
            return None
    return anatomy.head.at(closed(points))


def _legs(plan: Plan, pose: str, body: Frame) -> tuple[np.ndarray, np.ndarray]:
    hips = np.stack([body.at((0.12, 0.72)), body.at((-0.1, 0.78))])
    match pose:
        case "clinging":
            # Feet grip the trunk in front of the belly, far one higher.
            wall = body.at((0.0, 1.0))[0] + 0.1
            feet = np.array([[wall, hips[0, 1] - 0.12], [wall, hips[1, 1] + 0.02]])
        case "flying":
            feet = hips + step(-0.35 - 1.1 * max(plan.leg - 0.3, 0.0), 0.02)
            feet[1] += (0.04, 0.03)
        case "hovering":
            feet = hips + step(-0.02, 0.06)
        case _:
            ground = max(hips[:, 1].max(), body.at(_BODY)[:, 1].max() - 0.03)
            # A perching bird squats on bent legs.
            ground += plan.leg * (0.6 if pose == "perched" else 1.0)
            near = hips[1, 0] + 0.03
            feet = np.array([[max(hips[0, 0] + 0.03, near + 0.09), ground - 0.02], [near, ground]])
    return hips, feet


def _folded_wing(plan: Plan, body: Frame) -> Wing:
    tip = (-1.0 - 2 * plan.primaries, -0.02)
    upper = path([(0.7, -0.12), (0.5, -0.62), (0.0, -0.8), (-0.55, -0.62), tip])
    lower = path([(0.7, -0.12), (0.56, 0.3), (0.1, 0.5), (-0.5, 0.3), tip])
    upper, lower = body.at(upper), body.at(lower)
    return Wing(upper, lower, np.concatenate([upper, lower[-2:0:-1]]), spread=False)


def _spread_wings(plan: Plan, pose: str, body: Frame, angle: float, beat: float) -> tuple[Wing, Wing]:
    """Near and far wing. Raised wings lean back from the vertical, lowered ones hang; neither is ever edge on."""
    lift = np.sign(beat) * (0.45 + 0.55 * abs(beat)) if beat else 0.45
    near_root, far_root = body.at((0.52, -0.42)), body.at((0.6, -0.5))
    lean = 12.0 if pose == "flying" else 50.0
    if lift > 0:
        directions = (90.0 + lean + 40.0 * (1.0 - lift), 90.0 + lean - 28.0 + 10.0 * lift)
    else:
        directions = (-(100.0 + 35.0 * (1.0 + lift)), -(78.0 + 15.0 * (1.0 + lift)))
    length = plan.span * (0.55 + 0.45 * abs(lift))
    near = _spread_wing(plan, near_root, directions[0], length, angle)
    far = _spread_wing(plan, far_root, directions[1], length * 0.92, angle)
    return near, far


def _spread_wing(plan: Plan, root: np.ndarray, direction: float, length: float, angle: float) -> Wing:
    along = radians(direction)
    backward = radians(angle + 180.0)
    axes = np.array(
        [[cos(along) * length, cos(backward) * plan.chord], [-sin(along) * length, -sin(backward) * plan.chord]]
    )
    place = Frame(axes, root)
    p = plan.pointed
    tip = (1.0, 0.35 + 0.35 * p)
    leading = path([(0.0, 0.0), (0.2, -0.1), (0.45, -0.12), (0.75, -0.02 + 0.14 * p), tip])
    trailing = path([(0.0, 1.1), (0.25, 1.02), (0.5, 0.98 - 0.26 * p), (0.8, 0.9 - 0.3 * p), tip])
    edge = trailing.copy()
    # Scalloped feather ends; broad wings spread theirs like fingers.
    ends = np.arange(len(edge)) % 2
    ends[-3:] = 0
    share = np.linspace(0.0, 1.0, len(edge))
    edge[1:-1, 1] -= (ends * (0.03 + 0.13 * (1.0 - p) * np.clip(share * 2.2 - 1.0, 0.0, 1.0)))[1:-1]
    outline = np.concatenate([leading, edge[-2::-1]])
    return Wing(place.at(leading), place.at(trailing), place.at(outline), spread=True)


_BODY = closed(
    [
        (1.0, 0.0),
        (0.8, 0.66),
        (0.3, 1.0),
        (-0.3, 0.92),
        (-0.78, 0.5),
        (-1.02, 0.02),
        (-0.75, -0.48),
        (-0.1, -0.92),
        (0.55, -0.9),
    ]
)
_HEAD = closed(
    [
        (0.98, 0.08),
        (0.78, -0.5),
        (0.2, -0.95),
        (-0.45, -0.86),
        (-0.92, -0.3),
        (-0.9, 0.35),
        (-0.4, 0.86),
        (0.3, 0.86),
        (0.82, 0.52),
    ]
)
_TAILS = {
    "notched": [(0.0, -0.8), (0.6, -0.85), (1.0, -1.05), (0.93, 0.0), (1.0, 1.05), (0.6, 0.85), (0.0, 0.8)],
    "square": [(0.0, -0.8), (0.6, -0.85), (0.98, -1.0), (1.0, 0.0), (0.98, 1.0), (0.6, 0.85), (0.0, 0.8)],
    "rounded": [
        (0.0, -0.7),
        (0.55, -0.9),
        (0.86, -1.0),
        (0.97, -0.5),
        (1.0, 0.0),
        (0.97, 0.5),
        (0.86, 1.0),
        (0.55, 0.9),
        (0.0, 0.7),
    ],
    "forked": [
        (0.0, -1.3),
        (0.4, -1.1),
        (1.0, -1.6),
        (0.7, -0.8),
        (0.45, 0.0),
        (0.7, 0.8),
        (1.0, 1.6),
        (0.4, 1.1),
        (0.0, 1.3),
    ],
    "wedge": [(0.0, -0.9), (0.5, -0.95), (0.8, -0.75), (1.0, 0.0), (0.8, 0.75), (0.5, 0.95), (0.0, 0.9)],
}
