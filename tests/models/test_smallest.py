"""The proof runs on the smallest pictures a model takes, and only then on larger ones."""

import pytest
import timm
import torch
from torch import nn

from vislora.config.model import ModelConfig
from vislora.errors import AdapterError, ModelError
from vislora.lora import Adapters, LoraSettings
from vislora.models.smallest import check_own_size, prove_alive_cheaply
from vislora.models.vit import build_vit
from vislora.targets.timm import find_targets


def adapted(name: str, projections: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2).train()
    Adapters(model).add("it", find_targets(model, projections), LoraSettings(2, 2.0), trained=["head"])
    return model


def test_fresh_model_is_alive_on_its_smallest_pictures_and_stays_as_it_is():
    model = adapted("xcit_nano_12_p8_224", ["q", "k", "v", "o", "mlp"])  # LayerScales of 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prove_alive_cheaply(model) == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_pictures_grow_until_attention_has_two_tokens():
    """At 32 pixels the last stage has one: its softmax is 1, and q and k can't move it."""
    model = adapted("swiftformer_xs", ["o"])
    assert prove_alive_cheaply(model) == 32
    model = timm.create_model("shvit_s1", num_classes=2)
    Adapters(model).add("it", find_targets(model, ["q", "k"]), LoraSettings(2, 2.0))
    assert prove_alive_cheaply(model) > 64


def test_dead_adapter_is_named_after_the_models_own_size_was_tried():
    model = adapted("test_vit", ["q", "o"])
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    attention = model.blocks[1].attn
    proj = attention.proj
    attention.proj = nn.Linear(proj.in_features, proj.out_features)
    attention.spare = proj
    with pytest.raises(AdapterError, match=r"1 of \d+ adapted layers can't move the output: blocks.1.attn.spare;"):
        prove_alive_cheaply(model)
    assert sizes[0] == 32
    assert sizes[-1] == 160


def test_model_that_fails_at_its_own_size_tells_its_own_error():
    model = adapted("test_vit", ["q"])
    model.forward_features = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ModelError, match="of 160 pixels: division by zero; another") as told:
        prove_alive_cheaply(model)
    assert isinstance(told.value.__cause__, ZeroDivisionError)


def test_a_model_built_for_another_size_is_refused_by_its_name():
    model = build_vit(ModelConfig(name="efficientformer_l1", weights="random", img_size=128), 2)
    Adapters(model).add("it", find_targets(model, ["qkv"]), LoraSettings(2, 2.0))
    with pytest.raises(ModelError, match=r"^EfficientFormer can't take pictures of 128 pixels: The size of tensor a"):
        prove_alive_cheaply(model)


def test_a_size_between_two_that_it_takes_is_refused():
    model = build_vit(ModelConfig(name="test_maxvit", weights="random", img_size=40), 2)
    Adapters(model).add("it", find_targets(model, ["qkv"]), LoraSettings(2, 2.0))
    assert prove_alive_cheaply(model) == 32
    with pytest.raises(ModelError, match=r"^MaxxVit can't take pictures of 40 pixels: The size of tensor a"):
        check_own_size(model)
    check_own_size(build_vit(ModelConfig(name="test_maxvit", weights="random", img_size=64), 2))
