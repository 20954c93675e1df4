"""The LoRA core; it imports torch only."""

from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.inject import Adapters
from vislora.lora.layers import LoraConv2d, LoraLinear, LoraMultiheadAttention
from vislora.lora.liveness import prove_alive
from vislora.lora.low_rank import LowRank
from vislora.lora.reads import frozen_weight
from vislora.lora.settings import LoraSettings, TargetLayer

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
