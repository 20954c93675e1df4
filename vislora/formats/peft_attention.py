"""nn.MultiheadAttention in PEFT's files.

PEFT adapts one as a unit: q, k and v (`in_proj_weight`) under the module's own name, the output projection under
`base_layer.out_proj` in it, both of one rank and one alpha. It adapts no part alone: where only `out_proj` is adapted,
PEFT opens the file and leaves the output as it is.

PEFT 0.21 adds the output projection's update twice whenever it computes
(https://github.com/huggingface/peft/pull/3774). Files are read and written as PEFT's own `get_delta_weight` understands
them: once.
"""

from collections.abc import Collection
from dataclasses import replace

import torch

from vislora.lora import LowRankWeights
from vislora.lora.low_rank import alpha_at

_PART = ".out_proj"
_PEFT_PART = ".base_layer.out_proj"


def as_units(layers: dict[str, LowRankWeights]) -> dict[str, LowRankWeights]:
    """The same updates, with one rank and one alpha for q, k, v and the output projection of each attention.

    The smaller rank is filled up with zeros; the projection's B takes the quotient of the scales.
    """
    shared = dict(layers)
    for name in layers:
        if is_part(name, layers):
            unit, part = layers[name.removesuffix(_PART)], layers[name]
            rank = max(unit.rank, part.rank)
            unit = _of_rank(unit, rank)
            part = _of_rank(part, rank)
            if unit.scale == 0:  # what adds nothing can do so at any scale
                unit = replace(unit, lora_B=torch.zeros_like(unit.lora_B), alpha=part.alpha or 1.0)
            shared[name.removesuffix(_PART)] = unit
            shared[name] = replace(part, lora_B=part.lora_B * (part.scale / unit.scale), alpha=unit.alpha)
    return shared


def is_part(name: str, layers: Collection[str]) -> bool:
    """Whether a layer is the output projection of an attention that is adapted, too: no other layer lies in one."""
    return name.endswith(_PART) and name.removesuffix(_PART) in layers


def peft_name(name: str, layers: Collection[str]) -> str:
    """What PEFT calls a layer."""
    return f"{name.removesuffix(_PART)}{_PEFT_PART}" if is_part(name, layers) else name


def own_name(peft_name: str) -> str:
    """The layer that PEFT calls so."""
    return f"{peft_name.removesuffix(_PEFT_PART)}{_PART}" if peft_name.endswith(_PEFT_PART) else peft_name


def _of_rank(weights: LowRankWeights, rank: int) -> LowRankWeights:
    a = weights.lora_A.new_zeros(rank, weights.lora_A.shape[1])  # torch.zeros has another dtype where one was set
    b = weights.lora_B.new_zeros(weights.out, rank)
    a[: weights.rank], b[:, : weights.rank] = weights.lora_A, weights.lora_B
    alpha = alpha_at(rank, weights.alpha, weights.rank, weights.rslora)
    return replace(weights, lora_A=a, lora_B=b, rank=rank, alpha=alpha)
