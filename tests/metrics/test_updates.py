"""Norms of updates against the matrices multiplied out."""

import pytest
import timm
import torch

from vislora.lora import Adapters, LoraSettings, frozen_weight
from vislora.metrics.updates import layer_updates
from vislora.targets.timm import find_targets


@pytest.mark.parametrize("projections", [["qkv", "o", "mlp"], ["q", "v"]])
@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}])
def test_norms_are_those_of_merged_less_frozen_weights(projections, kind):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    adapters = Adapters(model)
    adapters.add("a", find_targets(model, projections), LoraSettings(rank=4, alpha=8, **kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = layer_updates(adapters.adapter("a"), model)
    before = {u.layer: frozen_weight(model.get_submodule(u.layer)).detach().double().clone() for u in found}
    adapters.merge()
    assert len(found) == len(find_targets(model, projections))
    for update in found:
        moved = frozen_weight(model.get_submodule(update.layer)).detach().double() - before[update.layer]
        assert update.update == pytest.approx(moved.norm().item(), rel=1e-5)
        assert update.base == pytest.approx(before[update.layer].norm().item(), rel=1e-6)
        assert update.relative == pytest.approx(moved.norm().item() / before[update.layer].norm().item(), rel=1e-5)
