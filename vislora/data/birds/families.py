"""Body plans of the invented species: each family draws a plan, a bill, poses and haunts."""

from dataclasses import replace

import numpy as np

from .species import Plan

Drawn = tuple[Plan, str, tuple[str, ...], tuple[str, ...]]  # plan, bill shape, poses, haunts


def _songbird(rng: np.random.Generator) -> Drawn:
    plan = Plan(
        rng.uniform(10, 26),
        depth=rng.uniform(0.47, 0.64),
        head=rng.uniform(0.185, 0.25),
        neck=rng.uniform(0.26, 0.36),
        neck_width=rng.uniform(0.18, 0.23),
        upright=rng.uniform(26, 52),
        stance=rng.uniform(16, 36),
        tail=rng.uniform(0.35, 1.1),
        tail_width=rng.uniform(0.065, 0.12),
        tail_shape=pick(rng, ["notched", "square", "rounded", "forked", "wedge"]),
        primaries=rng.uniform(0.04, 0.24),
        span=rng.uniform(0.95, 1.25),
        pointed=rng.uniform(0.3, 0.9),
        leg=rng.uniform(0.12, 0.3),
    )
    if rng.random() < 0.35:
        plan = replace(plan, crest=pick(rng, ["peak", "tuft"]), crest_length=rng.uniform(0.4, 1.3))
    shape = pick(rng, ["cone", "cone", "straight", "straight", "curved", "needle", "gape", "hooked"])
    return (
        plan,
        shape,
        ("perched", "standing", "perched", "flying"),
        tuple(some(rng, ("branch", "feeder", "meadow", "snow", "reeds", "wire", "rock", "sky"), 3, 5)),
    )


def _climber(rng: np.random.Generator) -> Drawn:
    plan, _, _, _ = _songbird(rng)
    plan = replace(plan, tail=rng.uniform(0.4, 0.6), tail_shape="wedge", leg=0.12, length_cm=rng.uniform(14, 40))
    return (
        plan,
        pick(rng, ["chisel", "chisel", "curved"]),
        ("clinging", "perched", "flying"),
        ("trunk", "branch", "sky"),
    )


def _swimmer(rng: np.random.Generator) -> Drawn:
    plan = Plan(
        rng.uniform(30, 70),
        depth=rng.uniform(0.42, 0.58),
        head=rng.uniform(0.13, 0.19),
        head_shape=rng.uniform(1.0, 1.4),
        neck=rng.uniform(0.34, 0.62),
        neck_width=rng.uniform(0.07, 0.13),
        neck_bend=rng.uniform(0.0, 0.3),
        upright=12,
        stance=rng.uniform(8, 30),
        crest=pick(rng, ["none", "none", "tuft", "peak"]),
        crest_length=rng.uniform(0.4, 1.1),
        tail=rng.uniform(0.18, 0.5),
        tail_shape=pick(rng, ["wedge", "square", "rounded"]),
        primaries=0.03,
        chord=0.38,
        pointed=rng.uniform(0.6, 0.95),
        leg=rng.uniform(0.12, 0.22),
        leg_width=0.028,
    )
    return (
        plan,
        pick(rng, ["flat", "flat", "dagger", "hooked", "triangle"]),
        ("swimming", "standing", "flying"),
        ("water", "reeds", "meadow", "rock", "sky"),
    )


def _wader(rng: np.random.Generator) -> Drawn:
    neck = rng.uniform(0.45, 1.05)
    plan = Plan(
        rng.uniform(25, 120),
        depth=rng.uniform(0.38, 0.5),
        head=rng.uniform(0.085, 0.14),
        head_shape=rng.uniform(1.15, 1.6),
        neck=neck,
        neck_width=rng.uniform(0.045, 0.09),
        neck_bend=rng.uniform(0.0, 0.75),
        upright=24,
        stance=rng.uniform(10, 26),
        crest=pick(rng, ["none", "none", "plume", "tuft"]),
        crest_length=rng.uniform(0.5, 1.1),
        tail=rng.uniform(0.15, 0.3),
        tail_shape="square",
        primaries=0.06,
        span=rng.uniform(1.1, 1.4),
        chord=rng.uniform(0.42, 0.56),
        pointed=rng.uniform(0.1, 0.8),
        leg=rng.uniform(0.52, 0.95),
        leg_width=rng.uniform(0.014, 0.02),
    )
    return (
        plan,
        pick(rng, ["dagger", "needle", "curved", "straight"]),
        ("standing", "standing", "flying"),
        ("water", "meadow", "rock", "sky"),
    )


def _owl(rng: np.random.Generator) -> Drawn:
    plan = Plan(
        rng.uniform(18, 50),
        depth=rng.uniform(0.54, 0.66),
        head=rng.uniform(0.26, 0.32),
        neck=0.33,
        neck_width=0.27,
        upright=rng.uniform(54, 66),
        stance=60,
        tail=rng.uniform(0.25, 0.5),
        tail_width=0.1,
        tail_shape="rounded",
        span=1.25,
        chord=0.54,
        pointed=0.2,
        leg=0.14,
        leg_width=0.03,
        face="front",
    )
    return plan, "hooked", ("perched", "perched", "flying"), ("branch", "rock", "snow", "sky")


def _hummer(rng: np.random.Generator) -> Drawn:
    plan = Plan(
        rng.uniform(7, 14),
        depth=rng.uniform(0.38, 0.48),
        head=rng.uniform(0.17, 0.21),
        neck=0.28,
        neck_width=0.15,
        upright=46,
        tail=rng.uniform(0.35, 1.0),
        tail_width=rng.uniform(0.06, 0.1),
        tail_shape=pick(rng, ["notched", "forked", "wedge"]),
        primaries=0.18,
        span=0.92,
        chord=0.27,
        pointed=0.9,
        leg=0.06,
        leg_width=0.012,
    )
    return (
        plan,
        pick(rng, ["needle", "needle", "curved"]),
        ("hovering", "hovering", "perched"),
        ("flowers", "branch", "sky", "feeder"),
    )


FAMILIES = (_songbird, _climber, _swimmer, _wader, _owl, _hummer)
SHARES = (0.5, 0.12, 0.14, 0.1, 0.06, 0.08)
BILL_LENGTHS = {
    "cone": 0.58, "straight": 0.75, "dagger": 1.9, "chisel": 0.85, "needle": 1.9, "curved": 1.25, "hooked": 0.6,
    "flat": 1.1, "triangle": 0.8, "gape": 0.45,
}  # fmt: skip
BILL_DEPTHS = {
    "cone": 0.68, "straight": 0.42, "dagger": 0.55, "chisel": 0.44, "needle": 0.22, "curved": 0.34, "hooked": 0.62,
    "flat": 0.6, "triangle": 1.0, "gape": 0.4,
}  # fmt: skip


def pick(rng: np.random.Generator, values: list):
    """One of `values`."""
    return values[int(rng.integers(len(values)))]


def some(rng: np.random.Generator, values: tuple[str, ...], low: int, high: int) -> list[str]:
    """From `low` to `high` different ones of `values`, in their order."""
    chosen = rng.choice(len(values), size=int(rng.integers(low, high + 1)), replace=False)
    return [values[i] for i in sorted(chosen)]
