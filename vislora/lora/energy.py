"""Adapters that are computed rather than trained, and how much they keep of the update that was asked for:

    energy = 1 - ||kept - wanted||_F^2 / ||wanted||_F^2

For a truncated SVD that is the share of the squared singular values (Eckart & Young 1936).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.errors import AdapterError, first_three
from vislora.lora.adapter import Adapter, LowRankWeights

NOISE = 1e-15  # squared singular values below this share of the largest are rounding errors of float64


@dataclass(frozen=True)
class Computed:
    """An adapter that was computed rather than trained.

    Attributes:
        adapter: the result.
        energy: the share of the wanted update that each layer keeps, at most 1; negative where the result is further
            from it than no update would be (a linear blend can be).
        ignored: changed tensors that were left out because they were asked to be.
    """

    adapter: Adapter
    energy: dict[str, float]
    ignored: tuple[str, ...] = ()

    def table(self) -> str:
        """Rank and energy by layer, then what is kept in full and what was left out; lines of text."""
        width = max(map(len, ("layer", *self.energy)))
        lines = [f"{'layer':{width}}  rank  energy"]
        lines += [
            f"{name:{width}}  {self.adapter.layers[name].rank:4}  {energy:6.1%}" for name, energy in self.energy.items()
        ]
        if self.adapter.trained:
            lines.append(f"kept in full: {', '.join(self.adapter.trained)}")
        if self.adapter.biases:
            lines.append(f"biases kept: {len(self.adapter.biases)}")
        if self.ignored:
            lines.append(f"left out, as asked: {first_three(self.ignored)}")
        return "\n".join(lines)


def check_wish(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise AdapterError("give a rank, or the energy to keep")
    if (rank is not None and rank < 1) or (energy is not None and not 0.0 < energy <= 1.0):
        raise AdapterError(f"rank={rank}, energy={energy}: expected a rank of at least 1, an energy in (0, 1]")


def choose_rank(squares: Tensor, rank: int | None, energy: float | None) -> tuple[int, float]:
    """The rank to keep and the energy it keeps, from squared singular values, the largest first."""
    total = squares.sum()
    if total == 0:
        return 1, 1.0
    shares = squares.cumsum(0) / total
    r = len(squares) if energy is None else int((shares < energy - 1e-9).sum()) + 1
    r = min(r, int((squares > squares[0] * NOISE).sum()), rank or len(squares))
    return r, float(shares[r - 1])


def update_norm(low: LowRankWeights) -> float:
    """||s B A||_F without building B A: with B = Q R and A^T = Q' R', it is ||s R R'^T||_F of r x r matrices."""
    one = low.as_one_pair()
    b, a = one.lora_B.double().flatten(1), one.lora_A.double().flatten(1)
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.T, mode="r").R
    return (one.scale * (r_b @ r_a.T)).norm().item()
