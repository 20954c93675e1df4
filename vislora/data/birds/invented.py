"""Species that do not exist: an endless family to train on without ever seeing a named one."""

from functools import lru_cache

import numpy as np

from .colour import RGB, from_hsv, lit, luminance, mix
from .families import BILL_DEPTHS, BILL_LENGTHS, FAMILIES, SHARES, pick, some
from .named import SPECIES
from .species import Bill, Mark, Plan, Species

CLEARANCE = 0.30  # smallest `distance` to any named species


@lru_cache(maxsize=4096)
def invented(index: int) -> Species:
    """The invented species number `index`, the same on every machine.

    Raises:
        ValueError: `index` is negative.
    """
    if index < 0:
        raise ValueError(f"invented species are numbered from 0, got {index}")
    rng = np.random.Generator(np.random.PCG64([0xB12D, index]))
    while True:
        species = _invent(f"invented {index:04d}", rng)
        if min(distance(species, named) for named in SPECIES.values()) >= CLEARANCE:
            return species


def distance(first: Species, second: Species) -> float:
    """How far two species look apart: body plan, colour by region and field marks, about 0-1."""
    build = np.abs(_build(first) - _build(second)).mean()
    colour = np.abs(_colours(first) - _colours(second)).mean()
    ours, theirs = ({mark.kind for mark in species.marks} for species in (first, second))
    shared = len(ours & theirs) / max(len(ours | theirs), 1)
    return float(0.4 * build + 0.9 * colour + 0.2 * (1.0 - shared))


# Scales that bring each proportion to about 0-1.
_SCALES = {
    "depth": 0.3, "head": 0.2, "head_shape": 0.7, "neck": 0.8, "neck_width": 0.2, "crest_length": 1.0, "tail": 0.9,
    "tail_width": 0.1, "leg": 0.8, "pointed": 1.0,
}  # fmt: skip


def _build(species: Species) -> np.ndarray:
    plan = [getattr(species.plan, name) / scale for name, scale in _SCALES.items()]
    return np.array([*plan, species.bill.length / 2.0, species.bill.depth])


def _colours(species: Species) -> np.ndarray:
    """Colours of the regions one sees, marks that cover a region in its place; [7, 3], 0-1."""
    painted = {mark.kind: mark.colour for mark in species.marks}
    head = painted.get("hood", painted.get("cap", species.upper))
    breast = painted.get("breast", species.under)
    regions = (
        head,
        species.upper,
        breast,
        painted.get("belly", species.under),
        species.wing,
        species.flight,
        species.tail,
    )
    return np.array(regions) / 255.0


def _invent(name: str, rng: np.random.Generator) -> Species:
    kind = FAMILIES[rng.choice(len(FAMILIES), p=SHARES)]
    plan, shape, poses, haunts = kind(rng)
    upper, under, wing, flight, tail, accents = _plumage(rng)
    horn = pick(
        rng,
        [(40, 40, 44), (92, 84, 76), (224, 150, 56), (232, 196, 70), (206, 84, 60), (150, 154, 160), (222, 130, 120)],
    )
    bill = Bill(
        shape,
        length=BILL_LENGTHS[shape] * rng.uniform(0.75, 1.35),
        depth=BILL_DEPTHS[shape] * rng.uniform(0.85, 1.3),
        upper=horn,
        lower=horn if rng.random() < 0.6 else lit(horn, 1.35),
        tip=None if rng.random() < 0.75 else pick(rng, [(30, 30, 32), (226, 80, 40), (236, 200, 70)]),
    )
    return Species(
        name,
        plan,
        bill,
        upper=upper,
        under=under,
        wing=wing,
        flight=flight,
        tail=tail,
        leg=pick(
            rng,
            [
                (50, 48, 50),
                (120, 96, 76),
                (196, 146, 112),
                (226, 120, 50),
                (210, 180, 70),
                (176, 70, 70),
                (108, 120, 130),
            ],
        ),
        eye=pick(rng, [(26, 20, 18), (26, 20, 18), (26, 20, 18), (210, 60, 40), (232, 196, 60), (226, 226, 220)]),
        marks=_marks(rng, accents, upper, under, plan),
        poses=poses,
        haunts=haunts,
    )


def _plumage(rng: np.random.Generator) -> tuple[RGB, RGB, RGB, RGB, RGB, list[RGB]]:
    """Ground colours of one scheme, and accents that stand out on it."""
    earthy = rng.random() < 0.45
    hue = rng.uniform(0.03, 0.13) if earthy else rng.random()
    upper = from_hsv(hue, rng.uniform(0.05, 0.6) if earthy else rng.uniform(0.35, 0.95), rng.uniform(0.12, 0.85))
    scheme = rng.random()
    if scheme < 0.35:
        under = mix(upper, (245, 240, 228), rng.uniform(0.6, 1.0))
    elif scheme < 0.6:
        under = from_hsv(
            hue + rng.choice([0.5, 0.33, -0.33, 0.12, -0.12]), rng.uniform(0.3, 0.9), rng.uniform(0.5, 0.95)
        )
    elif scheme < 0.8:
        under = from_hsv(rng.uniform(0.02, 0.15), rng.uniform(0.1, 0.85), rng.uniform(0.55, 0.95))
    else:
        under = lit(upper, rng.uniform(0.7, 1.3))
    wing = pick(
        rng,
        [
            lit(upper, rng.uniform(0.6, 1.1)),
            mix(upper, (40, 38, 40), 0.7),
            from_hsv(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.8)),
        ],
    )
    flight = mix(wing, (44, 40, 40), rng.uniform(0.1, 0.6))
    tail = pick(rng, [lit(upper, 0.8), flight, from_hsv(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.3, 0.9))])
    accents = [
        (32, 31, 34),
        (242, 241, 236),
        from_hsv(rng.random(), rng.uniform(0.65, 0.95), rng.uniform(0.6, 0.95)),
        from_hsv(hue + 0.5, 0.7, 0.8),
    ]
    return upper, under, wing, flight, tail, accents


_HEADS = (
    "cap",
    "hood",
    "mask",
    "face",
    "crown",
    "forehead",
    "cheek",
    "throat",
    "nape",
    "supercilium",
    "eye_line",
    "malar",
    "gorget",
)
_BODIES = (
    "breast",
    "belly",
    "breast_band",
    "flanks",
    "streaks",
    "spots",
    "bars",
    "undertail",
    "rump",
    "back",
    "collar",
)
_WINGS = ("wing_bars", "wing_patch", "shoulder", "primaries", "wing_edges", "wing_spots", "secondaries", "wing_line")
_TAILS = ("tail_band", "tail_tip", "outer_tail")
_COUNTS = {"streaks": 20, "spots": 16, "bars": 7, "wing_spots": 5, "wing_bars": 2, "tail_band": 4}


def _marks(rng: np.random.Generator, accents: list[RGB], upper: RGB, under: RGB, plan: Plan) -> tuple[Mark, ...]:
    kinds = [
        *some(rng, _BODIES, 1, 3),
        *some(rng, _HEADS, 1, 3),
        *some(rng, _WINGS, 0, 2),
        *some(rng, _TAILS, 0, 1),
    ]
    if plan.face == "front":
        kinds = [kind for kind in kinds if kind not in _HEADS] + ["disc"]
    if rng.random() < 0.3 and plan.face == "side":
        kinds.append("eye_ring")
    marks = []
    for kind in kinds:
        ground = (
            under
            if kind in ("breast", "belly", "streaks", "spots", "bars", "flanks", "throat", "breast_band", "undertail")
            else upper
        )
        # A mark that has its ground's lightness and hue would not be one.
        clear = [accent for accent in accents if abs(luminance(accent) - luminance(ground)) > 0.18]
        colour = pick(rng, clear or accents)
        count = max(1, round(_COUNTS.get(kind, 1) * rng.uniform(0.5, 1.3)))
        marks.append(Mark(kind, colour, float(rng.uniform(0.8, 1.25)), count))
    return tuple(marks)
