"""The trained part of one adapted layer: its low-rank pairs, and what they make of the weight."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.pissa import principal_pair

_MOST_DROPOUT = 0.99

Rows = tuple[tuple[int, int], ...]
"""Output rows [start, stop) of a projection that low-rank pairs write to, one range per pair."""

TINY = torch.finfo(torch.float32).tiny


def row_norms(weight: Tensor) -> Tensor:
    """The length of each output row, [out], in float32 or wider."""
    return torch.linalg.vector_norm(weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1), dim=1)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """s, the factor on B A: alpha / r, with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def alpha_at(rank: int, alpha: float, old_rank: int, rslora: bool) -> float:
    """The alpha that gives another rank the same scale."""
    return alpha * (math.sqrt(rank / old_rank) if rslora else rank / old_rank)


class Pair(NamedTuple):
    """Where one pair lives: its rows in y, its rows in the stacked A (columns of h), its rows in the stacked B."""

    rows: slice
    a: slice
    b: slice


class LowRank(nn.Module):
    """The trained part of one adapted layer: one or more low-rank pairs over the same input.

    A plain layer holds one pair over all its rows. A fused projection adapted in part (q and v of a timm `qkv`) holds
    one pair per chosen projection: their A are stacked, so that one product serves all, and each B writes to its rows.

    Args:
        weight: the frozen weight, [out, in] or [out, in, kh, kw]; gives shapes and device.
        rank: r of each pair.
        alpha: numerator of the scale.
        dropout: probability in [0, 0.99] of dropping an input element on the low-rank path, in training only.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        rows: the output rows of each pair; all rows as one pair by default.
        dora: train a magnitude for each of those rows as well; see `vislora.lora.dora`.
        pissa: start from the weight's principal part instead; see `vislora.lora.pissa`.

    Attributes:
        lora_A: [pairs * r, in] or [pairs * r, in, kh, kw], float32, Kaiming-uniform as in the paper's own code.
        lora_B: [sum of rows, r] or [sum of rows, r, 1, 1], float32, zero: an untrained adapter changes nothing.
        magnitude: [sum of rows], float32, the norms of the frozen rows; None without DoRA.
        start_A, start_B: with PiSSA, the frozen pairs that `lora_A` and `lora_B` started from, which are subtracted.
        multiplier: factor on the scale, 1.0 unless an adapter is applied at another strength.
        is_merged: whether the frozen weight holds it meanwhile. A state dict is then without it, as a model that loads
            the merged weight beside it would compute it twice.

    Raises:
        AdapterError: a rank, alpha, dropout, row range or combination that can't be.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        rows: Rows | None = None,
        dora: bool = False,
        pissa: bool = False,
    ) -> None:
        super().__init__()
        _check(weight, rank, alpha, dropout, rows, dora, pissa)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.rows = rows or ((0, weight.shape[0]),)
        self.pairs = _pairs(self.rows, 2 * rank if pissa else rank)
        self.multiplier = 1.0
        self.is_merged = False
        height = sum(stop - start for start, stop in self.rows)
        a = torch.empty(
            len(self.rows) * rank,
            *weight.shape[1:],
            dtype=torch.float32,
            device="meta" if weight.is_meta else "cpu",
        )
        # Each pair starts as it would alone: they have one fan_in. Without storage there is nothing to draw, and on the
        # meta device it would take longer than all the rest.
        if not weight.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = torch.zeros(height, rank, *[1] * (weight.dim() - 2), dtype=torch.float32, device=weight.device)
        self.lora_A = nn.Parameter(a.to(weight.device))
        self.lora_B = nn.Parameter(b)
        self.register_parameter("magnitude", None)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if pissa:
            starts = [principal_pair(weight.detach()[slice(*r)], rank, self.scale) for r in self.rows]
            self.start_A, self.start_B = (torch.cat(part) for part in zip(*starts, strict=True))
            with torch.no_grad():
                self.lora_A.copy_(self.start_A)
                self.lora_B.copy_(self.start_B)
        if dora:
            norms = row_norms(weight.detach())
            self.magnitude = nn.Parameter(torch.cat([norms[start:stop] for start, stop in self.rows]))

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.multiplier * scale_of(self.alpha, self.rank, self.rslora)

    def acting(self) -> tuple[Tensor, Tensor]:
        """A and B as the layer computes with them: with PiSSA [A; A0] and [B, -B0], each pair of rank 2r."""
        return self.with_start(self.lora_A, self.lora_B)

    def with_start(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The same of copies of A and B, wherever they are."""
        if self.start_A is None:
            return a, b
        both = [m.unflatten(0, (-1, self.rank)) for m in (a, self.start_A.to(a.device))]
        return torch.cat(both, 1).flatten(0, 1), torch.cat([b, -self.start_B.to(b.device)], 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_merged:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if not self.is_merged:
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        elif strict:
            unexpected.extend(key for key in state if key.startswith(prefix))

    def merged(self, weight: Tensor) -> Tensor:
        """What the layer computes with: W0 + s B A, with DoRA its rows at their magnitudes; float32 or wider,
        differentiable.

        The norm that DoRA divides by is a constant for the gradient (section 4.3 of its paper).
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        update = self.scale * (self.wide_B(weight.shape[0]).to(dtype) @ self.acting()[0].to(dtype).flatten(1))
        merged = weight.to(dtype) + update.view(weight.shape)
        if self.magnitude is None:
            return merged
        gain = self.acting_magnitudes(weight) / row_norms(merged.detach()).clamp_min(TINY)
        return merged * gain.view(-1, *[1] * (weight.dim() - 1))

    def wide_B(self, out: int) -> Tensor:
        """The acting B over all `out` rows of the layer, [out, pairs * its rank]: zero where a pair doesn't write."""
        a, b = self.acting()
        if self.rows == ((0, out),):
            return b.flatten(1)
        wide = b.new_zeros(out, a.shape[0])
        for pair in self.pairs:
            wide[pair.rows, pair.a] = b[pair.b].flatten(1)
        return wide

    def all_magnitudes(self, weight: Tensor) -> Tensor:
        """DoRA's magnitude of every output row, [out]: that of the frozen weight where no pair writes."""
        if self.rows == ((0, weight.shape[0]),):
            return self.magnitude
        full = row_norms(weight.detach())
        for pair in self.pairs:
            full[pair.rows] = self.magnitude[pair.b]
        return full

    def acting_magnitudes(self, weight: Tensor) -> Tensor:
        """The same at the adapter's strength: between the frozen row's length at 0 and the trained one at 1."""
        full = self.all_magnitudes(weight)
        return full if self.multiplier == 1.0 else torch.lerp(row_norms(weight.detach()), full, self.multiplier)


def _check(weight: Tensor, rank: int, alpha: float, dropout: float, rows: Rows | None, dora: bool, pissa: bool) -> None:
    if not isinstance(rank, int) or rank < 1 or not 0.0 <= dropout <= _MOST_DROPOUT:
        raise AdapterError(
            f"rank={rank!r}, dropout={dropout}: rank must be a whole number from 1 on, dropout in [0, {_MOST_DROPOUT}]"
        )
    if not math.isfinite(alpha) or (pissa and alpha <= 0):
        raise AdapterError(f"alpha={alpha}: expected a number" + (", with PiSSA above 0" if pissa else ""))
    if any(not 0 <= start < stop <= weight.shape[0] for start, stop in rows or ()):
        raise AdapterError(f"rows {rows} don't lie in a layer of {weight.shape[0]} output rows")
    if pissa and (dora or dropout):
        raise AdapterError("PiSSA goes with neither DoRA nor dropout, which would drop principal parts of W0")


def _pairs(rows: Rows, rank: int) -> list[Pair]:
    pairs, b = [], 0
    for i, (start, stop) in enumerate(rows):
        height = stop - start
        pairs.append(Pair(slice(start, stop), slice(i * rank, (i + 1) * rank), slice(b, b + height)))
        b += height
    return pairs
