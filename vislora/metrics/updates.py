"""How far an adapter moved each layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vislora.lora.adapter import Adapter, LowRankWeights


@dataclass(frozen=True)
class LayerUpdate:
    """Frobenius norms of a layer's update and of its frozen weight."""

    layer: str
    update: float
    base: float

    @property
    def relative(self) -> float:
        """||dW|| / ||W0||."""
        return self.update / self.base if self.base else float("inf")


def layer_updates(adapter: Adapter, weights: dict[str, Tensor]) -> list[LayerUpdate]:
    """||s B A|| beside ||W0|| for each adapted layer.

    Args:
        adapter: as trained.
        weights: the base model's, at least NAME.weight of each adapted layer.
    """
    return [
        LayerUpdate(name, update_norm(low), weights[f"{name}.weight"].double().norm().item())
        for name, low in adapter.layers.items()
    ]


def update_norm(low: LowRankWeights) -> float:
    """||s B A||_F without building B A: with B = Q R and A^T = Q' R', it is ||s R R'^T||_F of r x r matrices."""
    one = low.as_one_pair()
    b, a = one.lora_B.double().flatten(1), one.lora_A.double().flatten(1)
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.T, mode="r").R
    return (one.scale * (r_b @ r_a.T)).norm().item()
