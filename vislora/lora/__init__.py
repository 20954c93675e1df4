"""The LoRA core; it imports torch only."""

from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.inject import Adapters, LoraSettings, TargetLayer
from vislora.lora.layers import LoraConv2d, LoraLinear, LoraMultiheadAttention, LowRank
from vislora.lora.liveness import prove_alive
from vislora.lora.reads import frozen_weight

__all__ = [
    "Adapter",
    "Adapters",
    "LoraConv2d",
    "LoraLinear",
    "LoraMultiheadAttention",
    "LoraSettings",
    "LowRank",
    "LowRankWeights",
    "TargetLayer",
    "frozen_weight",
    "prove_alive",
]
