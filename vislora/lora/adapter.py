"""Adapter: the value that files hold, and that goes into and comes out of a model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vislora.lora.low_rank import Rows, alpha_at, scale_of


@dataclass(frozen=True)
class LowRankWeights:
    """The trained matrices of one layer; shapes as in `vislora.lora.low_rank.LowRank`."""

    lora_A: Tensor
    lora_B: Tensor
    rank: int
    alpha: float
    out: int  # output rows of the layer
    rslora: bool = False
    rows: Rows | None = None  # output rows of each pair; None: one pair over all of them
    magnitude: Tensor | None = None  # DoRA's length of every output row, [out]; the frozen one where no pair writes

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return scale_of(self.alpha, self.rank, self.rslora)

    def as_one_pair(self) -> "LowRankWeights":
        """The same update as one pair over all rows, as formats without row ranges need it.

        n pairs of rank r become one of rank n * r: A as it is (stacked already), B block-structured with zero rows
        where no pair writes. Alpha is rescaled so that the scale stays what it was.
        """
        if self.rows is None:
            return self
        pairs = len(self.rows)
        b = self.lora_B.new_zeros(self.out, pairs * self.rank, *self.lora_B.shape[2:])
        offset = 0
        for i, (start, stop) in enumerate(self.rows):
            b[start:stop, i * self.rank : (i + 1) * self.rank] = self.lora_B[offset : offset + stop - start]
            offset += stop - start
        rank = pairs * self.rank
        alpha = alpha_at(rank, self.alpha, self.rank, self.rslora)
        return LowRankWeights(self.lora_A, b, rank, alpha, self.out, self.rslora, magnitude=self.magnitude)


@dataclass(frozen=True)
class Adapter:
    """Everything an adapter adds to its base model.

    Attributes:
        layers: low-rank weights by the name of the adapted module.
        trained: state dicts of modules trained in full (the head), by module name.
        dropout: of the low-rank path while training.
        about: what can't be told from the tensors and travels with them as JSON: the base model, the classes, …
        biases: trained biases outside of those modules, by name.
    """

    layers: dict[str, LowRankWeights]
    trained: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dropout: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def equals(self, other: "Adapter") -> bool:
        """Same layers, settings and bits; `about` and dropout aside."""
        if self.layers.keys() != other.layers.keys() or self.trained.keys() != other.trained.keys():
            return False
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if (mine.rank, mine.scale, mine.rows) != (theirs.rank, theirs.scale, theirs.rows):
                return False
            if not all(_same(getattr(mine, key), getattr(theirs, key)) for key in ("lora_A", "lora_B", "magnitude")):
                return False
        return _same_state(self.biases, other.biases) and all(
            _same_state(state, other.trained[name]) for name, state in self.trained.items()
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
