"""Norms of updates against the matrices multiplied out."""

import pytest
import timm
import torch

from vislora.lora import Adapters, LoraSettings, frozen_weight
from vislora.metrics.updates import layer_updates, weight_updates
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


def test_of_a_model_trained_in_full_every_matrix_is_told_but_the_heads():
    tuned, base = (
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3) for _ in range(2)
    )
    base.load_state_dict(tuned.state_dict())
    tuned.blocks[1].mlp.fc1.weight.data[0, 0] += 3.0
    tuned.patch_embed.proj.weight.data[0, 0, 0, :2] += 2.0
    tuned.head.weight.data += 1.0
    found = {u.layer: u for u in weight_updates(tuned, base, ["head"])}
    assert next(iter(found)) == "patch_embed.proj"
    assert len(found) == 1 + 2 * 4
    assert found.pop("blocks.1.mlp.fc1").update == pytest.approx(3.0, rel=1e-5)
    assert found["patch_embed.proj"].base == pytest.approx(base.patch_embed.proj.weight.norm().item(), rel=1e-5)
    assert found.pop("patch_embed.proj").update == pytest.approx(8**0.5, rel=1e-5)
    assert all(u.update == 0 for u in found.values())
