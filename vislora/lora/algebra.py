"""Arithmetic on adapters: change the rank of one, blend several.

A DoRA layer is no sum of a frozen weight and an update: its rank can be changed, and a blend may hold it as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError, first_three
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.energy import NOISE, Computed, check_wish, choose_rank
from vislora.lora.low_rank import Rows, alpha_at


def resize(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Computed:
    """The same adapter at another rank, its scale unchanged.

    A layer is cut to its largest singular values, found from the two small matrices alone. Where it had fewer than
    `rank`, it gets untrained directions that change nothing (as a new adapter has), so that training can go on in them.
    DoRA's magnitudes stay; the energy is then that of the low-rank product alone.

    Args:
        adapter: any.
        rank: of all layers; with `energy`, the largest rank of a layer.
        energy: the share of each update's squared norm to keep, in (0, 1]; the smallest rank that does is taken.

    Raises:
        AdapterError: neither rank nor energy, or one that can't be.
    """
    check_wish(rank, energy)
    layers, kept = {}, {}
    for name, weights in adapter.layers.items():
        layers[name], kept[name] = _resized(weights, rank, energy)
    return Computed(replace(adapter, layers=layers), kept)


def blend(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str = "svd",
    rank: int | None = None,
    head: int | None = None,
) -> Computed:
    """One adapter that acts like the weighted sum of several updates; layers that only some of them have count too.

    Args:
        adapters: two or more.
        weights: a factor for each; any finite numbers.
        how: "cat" puts the pairs side by side: exact, of the sum of their ranks. "svd" cuts that to `rank`.
            "linear" averages A and B themselves, sqrt(|w s|) on each with the sign on A: of the same rank, but
            products across adapters come in, so that it is near the sum only where the adapters are alike. These are
            the formulas of PEFT's `add_weighted_adapter`.
        rank: of "svd"; by default the largest among the adapters'.
        head: whose fully trained modules and biases the result takes. Such things (classifiers, norms) are not
            averaged: they are one adapter's, and it must be said whose where several have them and they differ.

    Raises:
        AdapterError: a number that can't be, a DoRA layer that several have or whose factor isn't 1, unequal ranks for
            "linear", or heads that differ.
    """
    if how not in ("linear", "cat", "svd"):
        raise AdapterError(f"how={how!r}: choose linear, cat or svd")
    if rank is not None and how != "svd":
        raise AdapterError(f"rank={rank} belongs to how=svd; {how} has its own")
    if len(adapters) != len(weights) or len(adapters) < 2 or not all(math.isfinite(w) for w in weights):
        raise AdapterError(
            f"{len(adapters)} adapters with weights {list(weights)}: give two or more, a number for each"
        )
    if rank is not None:
        check_wish(rank, None)
    if not all(adapter.layers for adapter in adapters):
        raise AdapterError("an adapter without layers can't be blended")
    rank = rank or max(w.rank for adapter in adapters for w in adapter.layers.values())
    layers, energy = {}, {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        found = [(a.layers[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.layers]
        found = _with_the_same_kernel(found)
        _check_alike(name, found, how)
        exact = _concatenated(_with_the_same_rows(found))
        if how == "svd":
            layers[name], energy[name] = _resized(exact, min(rank, exact.rank), None)
        elif how == "linear":
            layers[name] = _averaged(found)
            energy[name] = _energy(layers[name], exact)
        else:
            layers[name], energy[name] = exact, 1.0
    dropout = max(adapter.dropout for adapter in adapters)
    source = _head_source(adapters, head)
    return Computed(Adapter(layers, source.trained, dropout, source.about, source.biases), energy)


def _resized(weights: LowRankWeights, rank: int | None, energy: float | None) -> tuple[LowRankWeights, float]:
    pairs = [_svd(b, a) for b, a in _matrices(weights)]
    count = max(len(s) for _, s, _ in pairs)
    squares = torch.stack([nn.functional.pad(s.square(), (0, count - len(s))) for _, s, _ in pairs])
    if energy is None:
        r, kept = rank, float(squares[:, :rank].sum() / squares.sum()) if squares.any() else 1.0
    else:
        r, kept = choose_rank(squares.sum(0), rank, energy)
    sized = [_at_rank(u, s, v, r) for u, s, v in pairs]
    a = torch.cat([a for _, a in sized]).reshape(-1, *weights.lora_A.shape[1:])
    b = torch.cat([b for b, _ in sized]).reshape(-1, r, *weights.lora_B.shape[2:])
    alpha = alpha_at(r, weights.alpha, weights.rank, weights.rslora)
    return replace(weights, lora_A=a, lora_B=b, rank=r, alpha=alpha), kept


def _matrices(weights: LowRankWeights) -> list[tuple[Tensor, Tensor]]:
    """B [rows, r] and A [r, in] of each pair, in float64."""
    rows: Rows = weights.rows or ((0, weights.out),)
    heights = [stop - start for start, stop in rows]
    bs, as_ = weights.lora_B.double().flatten(1).split(heights), weights.lora_A.double().flatten(1).split(weights.rank)
    return list(zip(bs, as_, strict=True))


def _svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of b @ a = U diag(S) V without making that product: its QR factors meet in an r x r matrix."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ u, s, v @ q_a.t()


def _at_rank(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A of one pair, float32, each with the root of the singular values, and fresh rows in A up to `rank`,
    also in the place of those that carry nothing: with A and B both zero a direction could never be trained."""
    root = s[: min(rank, int((s.square() > s[0] ** 2 * NOISE).sum()))].sqrt()
    b = nn.functional.pad(u[:, : len(root)] * root, (0, rank - len(root)))
    a = v[: len(root)] * root[:, None]
    if len(root) < rank:
        fresh = nn.init.kaiming_uniform_(torch.empty(rank - len(root), a.shape[1], device=a.device), a=math.sqrt(5))
        a = torch.cat([a, fresh.double()])
    return b.float(), a.float()


def _with_the_same_kernel(found: list[tuple[LowRankWeights, float]]) -> list[tuple[LowRankWeights, float]]:
    """Matrices as the 1x1 convolutions that they are in other adapters: files have either for one layer."""
    kernels = {tuple(w.lora_A.shape[2:]) for w, _ in found}
    if kernels != {(), (1, 1)}:
        return found
    wide = [
        (w.lora_A.reshape(*w.lora_A.shape[:2], 1, 1), w.lora_B.reshape(*w.lora_B.shape[:2], 1, 1)) for w, _ in found
    ]
    return [(replace(w, lora_A=a, lora_B=b), f) for (w, f), (a, b) in zip(found, wide, strict=True)]


def _with_the_same_rows(found: list[tuple[LowRankWeights, float]]) -> list[tuple[LowRankWeights, float]]:
    """Pairs over parts of a layer, in one adapter like in another, or else widened to all its rows."""
    if len({w.rows for w, _ in found}) == 1:
        return found
    return [(w.as_one_pair(), factor) for w, factor in found]


def _concatenated(found: list[tuple[LowRankWeights, float]]) -> LowRankWeights:
    first = found[0][0]
    rank = sum(w.rank for w, _ in found)
    pairs = zip(*[[(b * (w.scale * f), a) for b, a in _matrices(w)] for w, f in found], strict=True)
    joined = [(torch.cat([b for b, _ in pair], 1), torch.cat([a for _, a in pair])) for pair in pairs]
    a = torch.cat([a for _, a in joined]).float().reshape(-1, *first.lora_A.shape[1:])
    b = torch.cat([b for b, _ in joined]).float().reshape(-1, rank, *first.lora_B.shape[2:])
    return LowRankWeights(a, b, rank, float(rank), first.out, rows=first.rows, magnitude=first.magnitude)


def _averaged(found: list[tuple[LowRankWeights, float]]) -> LowRankWeights:
    first = found[0][0]
    factors = [w.scale * f for w, f in found]
    a = sum(w.lora_A.double() * math.copysign(math.sqrt(abs(f)), f) for (w, _), f in zip(found, factors, strict=True))
    b = sum(w.lora_B.double() * math.sqrt(abs(f)) for (w, _), f in zip(found, factors, strict=True))
    return LowRankWeights(
        a.float(), b.float(), first.rank, float(first.rank), first.out, rows=first.rows, magnitude=first.magnitude
    )


def _energy(kept: LowRankWeights, wanted: LowRankWeights) -> float:
    """1 - ||kept - wanted||^2 / ||wanted||^2 from r x r products alone."""
    error = total = 0.0
    for (b, a), (b_w, a_w) in zip(_matrices(kept), _matrices(wanted), strict=True):
        off_b, off_a = torch.cat([b * kept.scale, -b_w * wanted.scale], 1), torch.cat([a, a_w])
        error += float(((off_b.t() @ off_b) * (off_a @ off_a.t())).sum())
        total += float(((b_w.t() @ b_w) * (a_w @ a_w.t())).sum()) * wanted.scale**2
    return 1.0 - error / total if total else 1.0


def _head_source(adapters: Sequence[Adapter], head: int | None) -> Adapter:
    if head is not None:
        if not 0 <= head < len(adapters):
            raise AdapterError(f"head={head}: there are {len(adapters)} adapters, 0 to {len(adapters) - 1}")
        return adapters[head]
    with_own = [adapter for adapter in adapters if adapter.trained or adapter.biases]
    if not with_own:  # what one tells of the base stands for all
        return next((adapter for adapter in adapters if adapter.about), adapters[0])
    if any(not replace(adapter, layers={}).equals(replace(with_own[0], layers={})) for adapter in with_own):
        names = [*with_own[0].trained, *with_own[0].biases]
        raise AdapterError(
            f"the adapters have different fully trained modules ({first_three(names)}), which can't be blended; say "
            "whose the result takes: head=0 for the first adapter's, …"
        )
    return with_own[0]


def _check_alike(name: str, found: list[tuple[LowRankWeights, float]], how: str) -> None:
    layers = [low for low, _ in found]
    if any(w.magnitude is not None for w in layers) and [factor for _, factor in found] != [1.0]:
        raise AdapterError(
            f"{name} has a DoRA magnitude: its update is no sum that could be weighted, or blended with another's. Use "
            "it alone, or with a weight of 1 beside adapters of other layers; or where the model can be merged (python "
            "-m vislora.export), extract a plain LoRA from that (python -m vislora.extract)"
        )
    shapes = {(w.out, tuple(w.lora_A.shape[1:])) for w in layers}
    if len(shapes) > 1:
        raise AdapterError(f"{name} is of other shapes in the adapters: {sorted(shapes)}; they belong to other models")
    if how == "linear" and len({(w.rank, w.rows) for w in layers}) > 1:
        raise AdapterError(
            f"{name} has ranks {[w.rank for w in layers]} over rows {[w.rows for w in layers]}; how=linear needs equal "
            "ones: use svd or cat, or resize the adapters first"
        )
