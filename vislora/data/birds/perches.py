"""What a bird sits, stands, clings or hovers at."""

import numpy as np

from .colour import RGB, lit, mix
from .curves import closed, oval, path, step, tube
from .patch import Patch
from .stage import BARK, Stage, leaf, limb, stems


def set_stage(stage: Stage) -> None:
    """Paint what the bird sits, stands or hovers at."""
    pose, place = stage.scene.pose, stage.scene.backdrop
    if pose == "perched":
        _PERCHES[place](stage)
    elif pose == "standing":
        _GROUNDS[place](stage)
    elif pose == "clinging":
        _trunk(stage)
    elif pose == "hovering" and place in ("flowers", "feeder"):
        _flower(stage)
    elif pose == "swimming" and place == "reeds":
        stems(stage, 9, stage.bird[0, 1], 0.012)


def _branch(stage: Stage) -> None:
    """A branch under the feet, with twigs and leaves as far as the clutter goes."""
    rng, side = stage.rng, stage.pixels
    thick = float(np.clip(stage.cm * 0.8 * (0.7 + 0.6 * rng.random()), 0.012 * side, 0.035 * side))
    slope = 0.28 * (rng.random() - 0.5)
    foot = stage.feet.mean(axis=0) + step(0.0, thick * 0.8)
    reach = np.array([-1.3, -0.45, 0.0, 0.5, 1.3]) * side
    bow = np.array([rng.normal() * 0.03, 0.008, 0.0, 0.008, rng.normal() * 0.03]) * side
    spine = path(np.stack([foot[0] + reach, foot[1] + slope * reach + bow], axis=1), 5)
    bark = mix(BARK, (150, 140, 126), 0.6 * rng.random())
    limb(stage, spine, np.linspace(1.25, 0.85, len(spine)) * thick, bark)
    for _ in range(int(1 + 5 * stage.scene.clutter)):
        start = spine[rng.integers(len(spine))]
        end = start + np.array([rng.normal() * 0.2, rng.normal() * 0.22]) * side
        twig = path([start, (start + end) / 2 + rng.normal(size=2) * 0.03 * side, end], 3)
        limb(stage, twig, np.linspace(0.5, 0.25, len(twig)) * thick, bark)
        size = float(np.clip(stage.cm * 5.0, 0.06 * side, 0.16 * side))
        for point in twig[2::2]:
            leaf(stage, point + rng.normal(size=2) * 0.02 * side, 360 * rng.random(), size * (0.6 + 0.6 * rng.random()))


def _snowy_branch(stage: Stage) -> None:
    _branch(stage)
    rng, side = stage.rng, stage.pixels
    foot = stage.feet.mean(axis=0)
    for offset in (-0.32, -0.2, 0.22, 0.36):
        x = foot[0] + (offset + 0.04 * rng.normal()) * side
        stage.shape(oval(x, foot[1] + 0.01 * side, 0.07 * side, 0.022 * side), (244, 247, 251))


def _reed_perch(stage: Stage) -> None:
    stems(stage, 6, stage.bird[0, 1] - 0.1 * stage.pixels, 0.01)
    foot, side = stage.feet.mean(axis=0), stage.pixels
    lean = 0.35 * stage.forward
    spine = path([foot + step(-lean * side, side), foot, foot + step(0.5 * lean * side, -0.9 * side)], 4)
    stage.shape(tube(spine, np.full(len(spine), 0.013 * side)), (150, 136, 78))


def _feeder(stage: Stage) -> None:
    """A wooden tray on a post, with seed."""
    side, rng = stage.pixels, stage.rng
    x, y = stage.feet.mean(axis=0)
    y += 0.004 * side
    wood = mix((150, 112, 74), (120, 108, 96), rng.random())
    post = [(x - 0.03 * side, y), (x + 0.03 * side, y), (x + 0.03 * side, 1.1 * side), (x - 0.03 * side, 1.1 * side)]
    stage.shape(post, lit(wood, 0.75))
    seed = path(
        [(x - 0.3 * side, y + 0.02 * side), (x - 0.1 * side, y - 0.012 * side), (x + 0.26 * side, y + 0.02 * side)], 4
    )
    stage.shape(np.concatenate([seed, seed[:1] + step(0.3 * side, 0.03 * side)]), (92, 80, 66))
    tray = [(x - 0.4 * side, y + 0.008 * side), (x + 0.4 * side, y + 0.008 * side), (x + 0.37 * side, y + 0.07 * side)]
    tray += [(x - 0.37 * side, y + 0.07 * side)]
    edge = Patch(
        np.array([tray[0], tray[1], (tray[1][0], y + 0.024 * side), (tray[0][0], y + 0.024 * side)]), lit(wood, 1.2)
    )
    stage.shape(tray, wood, [edge])


def _rock(stage: Stage) -> None:
    side, rng = stage.pixels, stage.rng
    x, y = stage.feet.mean(axis=0)
    bumps = rng.random(7) * 0.05
    across = np.array([-0.62, -0.36, -0.16, 0.02, 0.2, 0.42, 0.7])
    down = np.array([0.16, 0.05, 0.0, -0.004, 0.005, 0.07, 0.22]) + bumps * (0.2, 0.6, 0.1, 0.0, 0.1, 0.6, 0.3)
    ridge = np.stack([x + across * side, y + down * side], axis=1)
    stone = mix((132, 128, 122), (112, 104, 92), rng.random())
    outline = np.concatenate([path(ridge, 3), [(x + 0.9 * side, 1.3 * side), (x - 0.9 * side, 1.3 * side)]])
    face = np.concatenate(
        [path(ridge + step(0.0, 0.07 * side), 3), [(x + 0.9 * side, 1.3 * side), (x - 0.9 * side, 1.3 * side)]]
    )
    patches = [Patch(face, lit(stone, 0.8))]
    for _ in range(5):
        spot = (x + rng.normal() * 0.25 * side, y + (0.05 + 0.2 * rng.random()) * side)
        patches.append(Patch(oval(*spot, 0.04 * side, 0.02 * side, 8), mix(stone, (176, 172, 110), 0.5)))
    stage.shape(outline, lit(stone, 1.12), patches)


def _wire(stage: Stage) -> None:
    x, y = stage.feet.mean(axis=0)
    side = stage.pixels
    slope = 0.12 * (stage.rng.random() - 0.5)
    radius = 0.008 * side
    ends = np.array(
        [[x - 1.2 * side, y + radius - slope * 1.2 * side], [x + 1.2 * side, y + radius + slope * 1.2 * side]]
    )
    stage.shape(tube(ends, np.full(2, radius)), (62, 62, 66))


def _flower_perch(stage: Stage) -> None:
    _branch(stage)
    rng, side = stage.rng, stage.pixels
    for _ in range(3):
        _blossom(stage, rng.random(2) * (1.0, 0.5) * side + (0.0, 0.5 * side), 0.05 * side, _petal(rng))


def _flower(stage: Stage) -> None:
    """A trumpet flower whose mouth is at the bill, hanging from a stem."""
    side, rng = stage.pixels, stage.rng
    tip, forward = stage.bill_tip, stage.forward
    long, wide = 0.2 * side, 0.055 * side
    mouth = tip - (0.03 * side * forward, 0.0)
    petal = _petal(rng)
    trumpet = [
        (0.0, -wide),
        (0.25 * long, -0.6 * wide),
        (long, -0.28 * wide),
        (long, 0.28 * wide),
        (0.25 * long, 0.6 * wide),
        (0.0, wide),
    ]
    trumpet = closed(np.array(trumpet) * (forward, 1.0), 3) + mouth
    base = mouth + step(forward * long, 0.0)
    stem = path(
        [base, base + step(forward * 0.12 * side, 0.05 * side), base + step(forward * 0.2 * side, 0.9 * side)], 4
    )
    stage.shape(tube(stem, np.full(len(stem), 0.008 * side)), (86, 118, 58))
    for x, y in ((0.16, 0.25), (0.2, 0.5), (0.12, 0.12)):
        leaf(stage, base + step(forward * x * side, y * side), 360 * rng.random(), 0.14 * side)
    stage.shape(trumpet, petal)
    stage.shape(oval(mouth[0], mouth[1], 0.3 * wide, wide, 12), lit(petal, 0.7))


def _petal(rng: np.random.Generator) -> RGB:
    return ((214, 70, 60), (226, 120, 60), (206, 92, 150), (236, 190, 70))[rng.integers(4)]


def _blossom(stage: Stage, point: np.ndarray, radius: float, petal: RGB) -> None:
    for angle in np.arange(5) * (2 * np.pi / 5):
        x, y = point + 0.6 * radius * np.array([np.cos(angle), np.sin(angle)])
        stage.shape(oval(x, y, 0.55 * radius, count=10), petal)
    stage.shape(oval(point[0], point[1], 0.3 * radius, count=8), (240, 214, 110))


def _trunk(stage: Stage) -> None:
    """A trunk in front of the belly; bark in furrows."""
    side, rng, forward = stage.pixels, stage.rng, stage.forward
    edge = stage.feet[:, 0].mean() - forward * 0.006 * side
    width = (0.26 + 0.16 * rng.random()) * side
    bark = mix((112, 96, 80), (150, 146, 136), rng.random())
    y = np.linspace(-0.1, 1.1, 7) * side
    wobble = rng.normal(size=7) * 0.008 * side
    near = np.stack([edge + wobble, y], axis=1)
    far = np.stack([edge + forward * width + wobble[::-1], y], axis=1)
    patches = [Patch(np.concatenate([near, (near + step(forward * 0.05 * side, 0.0))[::-1]]), lit(bark, 0.82))]
    patches.append(Patch(np.concatenate([far, (far - (forward * 0.09 * side, 0.0))[::-1]]), lit(bark, 0.7)))
    for _ in range(22):
        x0, y0 = edge + forward * rng.random() * width, rng.random() * side
        furrow = [(x0, y0), (x0 + rng.normal() * 0.012 * side, y0 + (0.06 + 0.1 * rng.random()) * side)]
        patches.append(Patch(np.array(furrow), lit(bark, 0.62 if rng.random() < 0.7 else 1.2), max(1.0, 0.012 * side)))
    stage.shape(np.concatenate([path(near, 3), path(far, 3)[::-1]]), bark, patches)


def _meadow(stage: Stage) -> None:
    stems(stage, int(6 + 14 * stage.scene.clutter), stage.bird[0, 1] + 0.1 * stage.pixels, 0.007)
    _level(stage, (128, 146, 72), 0.03)


def _level(stage: Stage, colour: RGB, bumps: float) -> None:
    """Ground that the feet stand on, to the lower edge."""
    side, rng = stage.pixels, stage.rng
    y = stage.feet[:, 1].mean()
    x = np.linspace(-0.1, 1.1, 7) * side
    ridge = np.stack([x, y - 0.05 * side + rng.normal(size=7) * 0.3 * bumps * side], axis=1)
    outline = np.concatenate([path(ridge, 3), [(1.2 * side, 1.2 * side), (-0.2 * side, 1.2 * side)]])
    front = np.concatenate(
        [path(ridge + step(0.0, 0.14 * side), 3), [(1.2 * side, 1.2 * side), (-0.2 * side, 1.2 * side)]]
    )
    foot = stage.feet.mean(axis=0)
    shadow = oval(foot[0], foot[1] + 0.01 * side, 0.75 * stage.body * 0.7, 0.022 * side)
    stage.shape(outline, colour, [Patch(front, lit(colour, 0.9)), Patch(shadow, lit(colour, 0.62))])


def _snow_ground(stage: Stage) -> None:
    _level(stage, (238, 241, 246), 0.02)


def _shallows(stage: Stage) -> None:
    """Nothing to stand on is seen; `_rings` closes the water around the legs."""


_PERCHES = {
    "branch": _branch,
    "reeds": _reed_perch,
    "snow": _snowy_branch,
    "feeder": _feeder,
    "rock": _rock,
    "wire": _wire,
    "flowers": _flower_perch,
}
_GROUNDS = {"meadow": _meadow, "water": _shallows, "rock": _rock, "snow": _snow_ground, "feeder": _feeder}
