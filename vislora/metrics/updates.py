"""How far an adapter moved each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vislora.lora import frozen_weight
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.energy import update_norm
from vislora.lora.names import inside


@dataclass(frozen=True)
class LayerUpdate:
    """Frobenius norms of a layer's update and of its frozen weight."""

    layer: str
    update: float
    base: float

    @property
    def relative(self) -> float | None:
        """||dW|| / ||W0||; None where the frozen weight is zero, as of layers that start as nothing."""
        return self.update / self.base if self.base else None


def layer_updates(adapter: Adapter, model: nn.Module) -> list[LayerUpdate]:
    """||dW|| beside ||W0|| for each adapted layer of a model that the adapter is in, or could be; in its order."""
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    updates = []
    for name, low in sorted(adapter.layers.items(), key=lambda layer: place[layer[0]]):
        weight = frozen_weight(model.get_submodule(name)).detach().cpu().double().flatten(1)
        norm = update_norm(low) if low.magnitude is None else _dora_norm(low, weight)
        updates.append(LayerUpdate(name, norm, weight.norm().item()))
    return updates


def weight_updates(tuned: nn.Module, base: nn.Module, new: Sequence[str]) -> list[LayerUpdate]:
    """||dW|| beside ||W0|| for each weight matrix of a model that was trained in full, in its order.

    Args:
        base: the same architecture as it was before.
        new: modules to leave out, which had nothing to start from.
    """
    updates = []
    for name, module in tuned.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and not any(inside(name, one) for one in new):
            before = base.get_submodule(name).weight.detach().cpu().double()
            moved = weight.detach().cpu().double() - before
            updates.append(LayerUpdate(name, moved.norm().item(), before.norm().item()))
    return updates


def _dora_norm(low: LowRankWeights, weight: Tensor) -> float:
    """DoRA's rows W0 + s B A at their trained lengths, less W0 [out, in]: no product of small matrices gives it."""
    one = low.as_one_pair()
    moved = weight + one.scale * (one.lora_B.double().flatten(1) @ one.lora_A.double().flatten(1))
    lengths = moved.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (moved * (one.magnitude.double()[:, None] / lengths) - weight).norm().item()
