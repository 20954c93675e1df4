"""The LoRA core; it imports torch only."""

from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.inject import Adapters, LoraSettings, TargetLayer
from vislora.lora.layers import LoraConv2d, LoraLinear, LowRank
from vislora.lora.liveness import prove_alive

__all__ = [
    "Adapter",
    "Adapters",
    "LoraConv2d",
    "LoraLinear",
    "LoraSettings",
    "LowRank",
    "LowRankWeights",
    "TargetLayer",
    "prove_alive",
]
