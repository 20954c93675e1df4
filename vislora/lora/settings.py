"""What is asked of a new adapter: which layers, and how their low-rank pairs are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from vislora.errors import AdapterError
from vislora.lora.low_rank import LowRank, Rows
from vislora.lora.names import fits

Bias = Literal["none", "lora_only", "all"]


@dataclass(frozen=True)
class TargetLayer:
    """A layer to adapt: its name in the model, and the output rows of each pair (None: one pair over all rows)."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class LoraSettings:
    """How new low-rank pairs are made; see `LowRank`.

    `rank_pattern` and `alpha_pattern` give other values to some layers: a key is a regular expression for the end of
    a layer's name, beginning where a word between dots does, and the first one that fits counts (PEFT's rule).
    `bias` says which biases are trained with the pairs: none, those of the adapted layers, or all.

    Raises:
        ValueError: another word for `bias`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    pissa: bool = False
    bias: Bias = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias is {self.bias!r}, expected one of {', '.join(get_args(Bias))}")

    def low_rank(self, target: TargetLayer, weight: Tensor) -> LowRank:
        """Untrained pairs for one layer.

        Raises:
            AdapterError: a rank beyond both sides of the weight, where the update has as many as the smaller one at
                most; or a value that can't be, or fits no such layer.
        """
        rank = _by_pattern(self.rank_pattern, target.name, self.rank)
        if isinstance(rank, int) and rank > (longest := max(len(weight), weight[0].numel())):
            raise AdapterError(
                f"rank {rank} for {target.name}, whose weight {list(weight.shape)} has no side longer than {longest}; "
                "choose a smaller one, as 8"
            )
        alpha = _by_pattern(self.alpha_pattern, target.name, self.alpha)
        return LowRank(weight, rank, alpha, self.dropout, self.rslora, target.rows, self.dora, self.pissa)


def _by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    return next((value for key, value in pattern.items() if fits(key, name)), default)
