"""Putting adapters in, switching, merging and taking them out leaves nothing behind and loses nothing."""

import copy
import re
import threading
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.utils.prune
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from vislora.errors import AdapterError
from vislora.lora import Adapter, Adapters, LoraLinear, LoraSettings, LowRank, LowRankWeights, TargetLayer, inject

BOTH_QKV = [TargetLayer("blocks.0.attn.qkv", ((0, 48), (96, 144))), TargetLayer("blocks.1.attn.qkv")]
SETTINGS = LoraSettings(rank=4, alpha=6.0)


def vit(classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
        return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **size).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, seed: int = 2) -> None:
    """Random numbers in everything trainable, as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def with_adapter(
    model: nn.Module, name: str = "birds", trained=("head",), targets=BOTH_QKV, settings=SETTINGS
) -> Adapters:
    adapters = Adapters(model)
    adapters.add(name, targets, settings, trained)
    train(model)
    return adapters


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# --- What stays -------------------------------------------------------------------------------------------------------


def test_base_keys_and_values_stay_and_only_lora_keys_are_added():
    model = vit()
    before = state(model)
    with_adapter(model, trained=())
    after = state(model)
    added = after.keys() - before.keys()
    assert added == {f"{target.name}.lora.{key}" for target in BOTH_QKV for key in ("lora_A", "lora_B")}
    assert same_bits(before, {key: after[key] for key in before})


def test_adapted_module_stays_the_same_object_and_its_hooks_keep_firing(images):
    model = vit()
    qkv = model.blocks[0].attn.qkv
    fired = []
    qkv.register_forward_hook(lambda module, args, output: fired.append(type(module)))
    adapters = with_adapter(model)
    assert model.blocks[0].attn.qkv is qkv
    model(images)
    adapters.merge()
    model(images)
    adapters.remove("birds")
    model(images)
    assert fired == [LoraLinear, nn.Linear, nn.Linear]


def test_only_the_adapters_parameters_require_gradients(images):
    model = vit()
    with_adapter(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{t.name}.lora.{key}" for t in BOTH_QKV for key in ("lora_A", "lora_B")} | {
        "head.weight",
        "head.bias",
    }
    model(images).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


def test_modes_never_change_parameters(images):
    model = vit()
    with_adapter(model)
    before = state(model)
    logits = model(images)
    model.train()
    model.eval()
    assert same_bits(before, state(model))
    assert torch.equal(model(images), logits)
    assert model.blocks[0].attn.qkv.lora.training is False


def test_head_of_an_adapter_takes_the_mode_of_the_model():
    model = vit().train()
    adapters = with_adapter(model)
    model.eval()
    adapters.deactivate()
    assert not model.head.training
    model.train()
    adapters.activate("birds")
    assert model.head.training


# --- Merge ------------------------------------------------------------------------------------------------------------


def test_merged_model_gives_the_adapted_logits(images):
    model = vit()
    base = model(images)
    adapters = with_adapter(model)
    adapted = model(images)
    adapters.merge()
    assert (adapted - base).abs().max() > 0.1
    assert torch.allclose(model(images), adapted, atol=1e-5)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert not model.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_weights_and_logits_bit_for_bit(images, dtype):
    model = vit().to(dtype)
    adapters = with_adapter(model, trained=())
    before, logits = state(model), model(images.to(dtype))
    for _ in range(2):
        adapters.merge()
        assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
        adapters.unmerge()
        assert same_bits(before, state(model))
    assert torch.equal(model(images.to(dtype)), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype):
    model = vit().to(dtype)
    weight = model.blocks[0].attn.qkv.weight.detach().double()
    adapters = with_adapter(model, trained=())
    lora = model.blocks[0].attn.qkv.lora
    a, b = lora.lora_A.detach().double(), lora.lora_B.detach().double()
    exact = weight.clone()
    exact[:48] += 6 / 4 * b[:48] @ a[:4]
    exact[96:] += 6 / 4 * b[48:] @ a[4:]
    adapters.merge()
    merged = model.blocks[0].attn.qkv.weight.detach()
    assert torch.equal(merged[48:96], weight.to(dtype)[48:96])
    rounded = exact.to(dtype)
    # float32 sums may fall on the other side of a tie: one in a thousand, and then by one unit in the last place
    assert (merged != rounded).double().mean() < 1e-3
    assert ((merged.double() - exact).abs() <= 1.02 * (rounded.double() - exact).abs() + 1e-6).all()


def test_merge_of_a_convolution_gives_the_adapted_output():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1))
    adapters = with_adapter(model, trained=(), targets=[TargetLayer("0", ((0, 2), (4, 6)))])
    x = torch.randn(2, 3, 8, 8)
    adapted = model(x)
    adapters.merge()
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors():
    adapters = with_adapter(vit())
    with pytest.raises(AdapterError, match="nothing to unmerge"):
        adapters.unmerge()
    adapters.merge()
    with pytest.raises(AdapterError, match="merged already"):
        adapters.merge()
    adapters.deactivate()
    with pytest.raises(AdapterError, match="no adapter is active"):
        adapters.merge()


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_models_state_is_a_plain_models_and_none_is_loaded_into_one_that_computes_otherwise(images, dora):
    model = vit()
    adapters = with_adapter(model, settings=replace(SETTINGS, dora=dora))
    live, before = state(model), model(images)
    adapters.merge()
    merged, plain = state(model), vit()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(images), model(images), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*qkv\.lora\.lora_A"):
        model.load_state_dict(live)
    model.load_state_dict(merged)
    adapters.unmerge()
    assert same_bits(live, state(model))
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv\.lora\.lora_A"):
        model.load_state_dict(merged)
    model.load_state_dict(live)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_merging_for_good_leaves_a_plain_model_with_the_adapters_logits_and_head(images):
    plain, model = vit(), vit()
    adapters = with_adapter(model)
    before, head = model(images), model.head.weight.clone()
    adapters.merge_and_unload()
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model.head.weight, head)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapters.active is None
    with pytest.raises(AdapterError, match="there is none"):
        adapters.activate("birds")
    with pytest.raises(AdapterError, match="no adapter is active"):
        adapters.merge_and_unload()
    assert with_adapter(model).active == "birds"  # and it can be adapted anew


def test_switching_or_removing_a_merged_adapter_unmerges_it(images):
    model = vit()
    before, logits = state(model), model(images)
    adapters = with_adapter(model)
    adapters.merge()
    adapters.remove("birds")
    assert same_bits(before, state(model))
    assert torch.equal(model(images), logits)


def test_merge_that_fails_leaves_the_adapter_at_work(images, monkeypatch):
    model = vit()
    before, adapters = state(model), with_adapter(model)
    logits = model(images)
    layers = iter(adapters.adapter("birds").layers)

    def merged(low: LowRank, weight: Tensor) -> Tensor:
        if next(layers) == "blocks.1.attn.qkv":
            raise torch.OutOfMemoryError
        return weight

    monkeypatch.setattr(LowRank, "merged", merged)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.merge()
    assert torch.equal(model(images), logits)
    adapters.remove("birds")
    assert same_bits(before, state(model))


def test_unmerge_that_failed_is_done_by_the_next(images, monkeypatch):
    model = vit()
    before, adapters = state(model), with_adapter(model)
    adapted = model(images)
    adapters.merge()
    merged, put, asked = model(images), inject.set_frozen_weight, []

    def put_one(layer: nn.Module, weight: nn.Parameter) -> None:
        asked.append(layer)
        if len(asked) == 2:
            raise MemoryError
        put(layer, weight)

    monkeypatch.setattr(inject, "set_frozen_weight", put_one)
    with pytest.raises(MemoryError):
        adapters.unmerge()
    torch.testing.assert_close(model(images), merged, rtol=0, atol=1e-5)
    adapters.unmerge()
    assert torch.equal(model(images), adapted)
    adapters.remove("birds")
    assert same_bits(state(model), before)


class Tied(nn.Module):
    """Two layers that share one weight, as embeddings and their projection often do."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_merging_layers_that_share_a_weight_changes_each_by_its_own_update(names):
    model, x = Tied(), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    base = model(x)
    adapters = with_adapter(model, trained=(), targets=[TargetLayer(name) for name in names])
    adapted = model(x).detach()
    adapters.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-6)
    adapters.remove("birds")
    assert torch.equal(model(x), base)
    assert model.one.weight is model.two.weight


def test_flags_come_back_where_layers_that_shared_a_weight_are_merged_for_good():
    model = Tied()
    with_adapter(model, trained=(), targets=[TargetLayer("one")]).merge_and_unload()
    assert model.one.weight is not model.two.weight
    assert all(p.requires_grad for p in model.parameters())


def test_weights_come_back_where_a_merged_model_has_gone(images):
    model = vit()
    base, adapters = state(model), with_adapter(model, trained=())
    adapters.merge()
    model.double()
    adapters.remove("birds")
    assert same_bits(state(model), {key: value.double() for key, value in base.items()})
    model(images.double())


def test_base_models_head_follows_to_another_device():
    model = vit()
    adapters = with_adapter(model)
    model.to("meta")
    adapters.remove("birds")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_set_aside_follows_to_another_dtype(images, dtype):
    model = vit()
    base = state(model)
    adapters = with_adapter(model)
    adapters.add("cats", BOTH_QKV, LoraSettings(4, 6.0, bias="all"), ["head"])
    train(model, 3)
    wanted = {"cats": model(images)}
    adapters.activate("birds")
    wanted["birds"] = model(images)
    model.to(dtype)
    near = {"rtol": 0.2, "atol": 0.2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for name in ("birds", "cats", "birds"):
        adapters.activate(name)
        torch.testing.assert_close(model(images.to(dtype)), wanted[name].to(dtype), **near)
    adapters.remove("cats")
    adapters.add("others", BOTH_QKV, SETTINGS, ["head"])
    with adapters.per_sample(["birds", None, "others"]):
        torch.testing.assert_close(model(images.to(dtype))[0], wanted["birds"][0].to(dtype), **near)
    adapters.remove("birds")
    adapters.remove("others")
    assert same_bits(state(model), {key: value.to(dtype) for key, value in base.items()})


def test_adapters_of_one_batch_follow_to_another_dtype(images):
    model = vit()
    adapters = with_adapter(model)
    adapters.add("cats", BOTH_QKV, SETTINGS, ["head"])
    train(model, 3)
    wanted = {}
    for name in ("birds", "cats"):
        adapters.activate(name)
        wanted[name] = model(images).double()
    model.double()
    with adapters.per_sample(["birds", "cats", None]):
        found = model(images.double())
    torch.testing.assert_close(found[0], wanted["birds"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], wanted["cats"][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32], ids=["", "converted with the adapter in it"])
def test_base_keeps_its_dtype_where_only_what_is_trained_gets_another(images, start):
    """As `diffusers.training_utils.cast_training_params` does it."""
    model = vit().to(start)
    base, adapters = state(model), Adapters(model)
    adapters.add("birds", BOTH_QKV, LoraSettings(4, 6.0, bias="lora_only"), ["head"])
    model.bfloat16()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    adapters.add("cats", BOTH_QKV, SETTINGS, ["head"])
    adapters.activate("birds")
    assert model.head.weight.dtype == model.blocks[0].attn.qkv.bias.dtype == torch.float32
    adapters.remove("birds")
    adapters.remove("cats")
    assert same_bits(state(model), {key: value.bfloat16() for key, value in base.items()})
    model(images.bfloat16())


@pytest.mark.parametrize("name", ["birds", None])
def test_model_of_several_dtypes_is_converted_as_a_whole(images, name):
    model = vit().bfloat16()
    model.head.float()
    adapters = with_adapter(model)
    if name is None:
        adapters.deactivate()
    model.double()
    adapters.activate("birds")
    assert {p.dtype for p in model.head.parameters()} == {torch.float64}
    adapters.remove("birds")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_hooks_whose_owner_cant_be_copied_are_shared():
    class Owner:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def hook(self, *args) -> None:
            pass

    model, owner = vit(), Owner()
    model.head.register_load_state_dict_pre_hook(owner.hook)
    model.head.register_forward_pre_hook(owner.hook)
    with_adapter(model).remove("birds")


def test_modules_with_buffers_and_states_of_their_own_follow_too():
    class Head(nn.Linear):
        def __init__(self) -> None:
            super().__init__(48, 5)
            self.register_buffer("unsaved", torch.ones(5), persistent=False)

        def get_extra_state(self) -> dict:
            return {"version": 2}

        def set_extra_state(self, state: dict) -> None:
            pass

    model = vit()
    model.head = Head()
    adapters = with_adapter(model)
    model.double()
    adapters.remove("birds")
    assert model.head.unsaved.dtype == model.head.weight.dtype == torch.float64


def test_module_trained_in_full_may_be_wrapped(images):
    model = vit()
    before, adapters = state(model), with_adapter(model)
    wanted = adapters.adapter("birds")
    model.head = checkpoint_wrapper(model.head)
    assert adapters.adapter("birds").equals(wanted)
    model(images)
    adapters.remove("birds")
    assert same_bits(state(model), before)
    adapters.add("cats", BOTH_QKV, SETTINGS, ["head"])
    own = model.head
    model.head = nn.Sequential(own, nn.Linear(5, 2))  # another head, and not a wrapper
    with pytest.raises(AdapterError, match="head was replaced"):
        adapters.adapter("cats")
    with pytest.raises(AdapterError, match="head was replaced"):
        adapters.deactivate()


def test_merging_a_float64_model_loses_nothing():
    layer = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64))
    before, adapters = layer[0].weight.clone(), Adapters(layer)
    adapters.add("untrained", [TargetLayer("0")], SETTINGS)
    adapters.merge()
    assert torch.equal(layer[0].weight, before)


def test_scale_of_a_merged_adapter_acts_or_is_refused(images):
    model = vit()
    adapters = with_adapter(model)
    adapters.merge()
    before = model(images)
    try:
        adapters.scale("birds", 0.0)
    except AdapterError:
        return
    assert not torch.equal(model(images), before)


def test_scale_of_an_adapter_beside_the_merged_one_can_be_changed(images):
    model = vit()
    adapters = with_adapter(model, "one", trained=())
    adapters.add("two", BOTH_QKV, SETTINGS)
    adapters.merge()
    adapters.scale("one", 0.0)
    adapters.activate("one")
    assert torch.allclose(model(images), vit()(images), atol=1e-6)


# --- Many adapters ----------------------------------------------------------------------------------------------------


def trained_value(classes: int, seed: int, images: Tensor) -> tuple[Adapter, Tensor]:
    """An adapter trained on a model of its own, and its logits there."""
    model = vit()
    model.head = nn.Linear(48, classes)
    adapters = Adapters(model)
    adapters.add("it", BOTH_QKV, SETTINGS, ["head"])
    train(model, seed)
    return adapters.adapter("it"), model(images).detach()


def test_switching_gives_each_adapter_its_own_logits_and_classes(images):
    first, first_logits = trained_value(7, 3, images)
    second, second_logits = trained_value(2, 4, images)
    model = vit()
    base = model(images)
    adapters = Adapters(model)
    adapters.load("first", first)
    adapters.load("second", second)
    assert adapters.names == ["first", "second"]
    assert adapters.active == "second"
    for _ in range(2):
        adapters.activate("first")
        assert torch.equal(model(images), first_logits)
        adapters.activate("second")
        assert torch.equal(model(images), second_logits)
        adapters.deactivate()
        assert torch.equal(model(images), base)
    adapters.activate("first")
    adapters.remove("second")
    assert torch.equal(model(images), first_logits)
    assert adapters.adapter("first").equals(first)


def test_training_one_adapter_leaves_the_other_alone(images):
    first, first_logits = trained_value(7, 3, images)
    model = vit()
    adapters = Adapters(model)
    adapters.load("first", first)
    adapters.add("second", BOTH_QKV, SETTINGS, ["norm"])
    train(model)
    adapters.activate("first")
    assert torch.equal(model(images), first_logits)


def test_head_of_a_second_adapter_starts_from_the_base_models_head():
    model = vit()
    base = model.head.weight.clone()
    adapters = with_adapter(model)
    adapters.add("second", BOTH_QKV, SETTINGS, ["head"])
    assert torch.equal(model.head.weight, base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_new_adapter_starts_from_the_base_whatever_acts_meanwhile(images, kind, merged):
    model = vit()
    base = model(images)
    adapters = with_adapter(model, trained=("head", "blocks.1.mlp"))
    if merged:
        adapters.merge()
    adapters.add("new", BOTH_QKV[1:], LoraSettings(rank=4, alpha=4.0, **{kind: True}), trained=["blocks.1.mlp"])
    torch.testing.assert_close(model(images), base, rtol=1e-4, atol=1e-5)


def test_new_adapter_copies_modules_without_what_acts_inside_them():
    model = vit()
    adapters = with_adapter(model, targets=[TargetLayer("blocks.1.mlp.fc1")])
    adapters.add("new", BOTH_QKV, SETTINGS, trained=["blocks.1.mlp"])
    saved = adapters.adapter("new")
    assert saved.trained["blocks.1.mlp"].keys() == vit().blocks[1].mlp.state_dict().keys()
    adapters.remove("new")
    adapters.load("again", saved)


@pytest.mark.parametrize("merged", [False, True])
def test_failed_addition_leaves_the_acting_adapter_as_it_was(images, merged):
    model = vit()
    adapters = with_adapter(model)
    if merged:
        adapters.merge()
    logits = model(images)
    with pytest.raises(AdapterError, match="named twice"):
        adapters.add("new", [*BOTH_QKV, *BOTH_QKV], SETTINGS)
    assert (adapters.names, adapters.active) == (["birds"], "birds")
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("merged", [False, True])
def test_failed_activation_leaves_the_acting_adapter_as_it_was(images, merged):
    model = vit()
    adapters = Adapters(model)
    adapters.add("cats", BOTH_QKV, SETTINGS)
    adapters.add("birds", [TargetLayer("blocks.0.attn.proj")], SETTINGS, trained=["head"])
    train(model)
    if merged:
        adapters.merge()
    model.blocks[0].attn.qkv = nn.Sequential(model.blocks[0].attn.qkv)
    logits = model(images)
    for step in (adapters.activate, adapters.adapter):
        with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has become a Sequential"):
            step("cats")
    with pytest.raises(AdapterError, match=r"has become a Seq|is merged"), adapters.per_sample(["birds", "cats"]):
        pass
    assert adapters.active == "birds"
    assert torch.equal(model(images), logits)


def test_activation_makes_every_part_trainable_again():
    model = vit()
    adapters = with_adapter(model)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    adapters.activate("birds")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def test_adapter_brings_its_head_where_the_models_was_taken_off(images):
    model = vit()
    adapters = with_adapter(model)
    logits = model(images)
    adapters.deactivate()
    model.reset_classifier(0)
    adapters.activate("birds")
    assert torch.equal(model(images), logits)
    adapters.remove("birds")
    assert model(images).shape == (3, 48)


def test_value_of_an_adapter_is_the_same_while_another_is_merged():
    model = vit()
    adapters = Adapters(model)
    adapters.add("dora", BOTH_QKV, LoraSettings(rank=4, alpha=6.0, dora=True))  # whose file has a length of every row
    train(model)
    value = adapters.adapter("dora")
    adapters.add("birds", [TargetLayer("blocks.0.attn.qkv")], SETTINGS)
    train(model)
    adapters.merge()
    assert adapters.adapter("dora").equals(value)


def test_what_an_adapter_tells_of_itself_comes_back_with_its_values():
    adapters = Adapters(vit())
    adapters.add("new", BOTH_QKV, SETTINGS)
    assert adapters.adapter("new").about == {}
    told = {"classes": ["wren", "tit"]}
    adapters.load("birds", replace(adapters.adapter("new"), about=told))
    told["classes"].append("owl")
    for value in (adapters.adapter("birds"), adapters.adapter("birds")):
        assert value.about == {"classes": ["wren", "tit"]}
        value.about["classes"].clear()
    adapters.blend("both", {"new": 0.5, "birds": 0.5})
    assert adapters.adapter("both").about == {"classes": ["wren", "tit"]}


def test_adapter_value_is_a_copy():
    model = vit()
    adapters = with_adapter(model)
    value = adapters.adapter("birds")
    as_read = copy.deepcopy(value)
    train(model)
    assert value.equals(as_read)
    assert not value.equals(adapters.adapter("birds"))


def test_training_a_loaded_adapter_leaves_the_value_it_came_from_alone():
    source = vit()
    adapters = Adapters(source)
    adapters.add("birds", BOTH_QKV, LoraSettings(4, 6.0, bias="lora_only"), ["head"])
    value = adapters.adapter("birds")
    kept, model = copy.deepcopy(value), vit()
    Adapters(model).load("birds", value)
    train(model)
    assert value.equals(kept)


def test_scale_is_the_strength_of_the_low_rank_path_alone(images):
    model = vit()
    adapters = with_adapter(model)
    head = copy.deepcopy(model.head)
    bare = vit()
    bare.head = head
    full = model(images)
    adapters.scale("birds", 0.0)
    assert torch.allclose(model(images), bare(images), atol=1e-6)
    adapters.scale("birds", 1.0)
    assert torch.equal(model(images), full)
    with pytest.raises(AdapterError, match="can't be scaled by nan"):
        adapters.scale("birds", float("nan"))
    adapters.scale("birds", 0.5)
    halved = copy.deepcopy(adapters.adapter("birds"))
    for weights in halved.layers.values():
        weights.lora_B.mul_(0.5)
    other = Adapters(bare)
    other.load("halved", halved)
    assert torch.allclose(model(images), bare(images), atol=1e-5)


# --- Taking it out ----------------------------------------------------------------------------------------------------


def test_removed_adapter_leaves_the_model_bit_for_bit_what_it_was(images):
    model = vit()
    model.blocks[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = state(model)
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    logits = model(images)
    adapters = with_adapter(model)
    assert not torch.allclose(model(images), logits, atol=0.1)
    adapters.remove("birds")
    assert adapters.names == []
    assert same_bits(before, state(model))
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == modules
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == flags
    assert torch.equal(model(images), logits)
    Adapters(model).add("birds", BOTH_QKV, SETTINGS)  # and it can be adapted again


def test_deepcopy_of_an_adapted_model_is_independent(images):
    model = vit()
    with_adapter(model)
    logits = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), logits)
    train(twin)
    assert not torch.allclose(twin(images), logits, atol=0.1)
    assert torch.equal(model(images), logits)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["blocks.7.attn.qkv", "decoder"])
def test_unknown_module_is_named(path):
    with pytest.raises(AdapterError, match=f"VisionTransformer has no module '{path}'"):
        Adapters(vit()).add("birds", [TargetLayer(path)], SETTINGS)
    with pytest.raises(AdapterError, match=f"VisionTransformer has no module '{path}'"):
        Adapters(vit()).add("birds", BOTH_QKV, SETTINGS, [path])


@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.0"])
def test_module_of_another_class_is_named(path):
    model = vit()
    with pytest.raises(AdapterError, match=f"{path} is a {type(model.get_submodule(path)).__name__}"):
        Adapters(model).add("birds", [TargetLayer(path)], SETTINGS)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"groups": 2}, "in 2 groups"),
        ({"dilation": 2}, r"dilation=\(2, 2\), whose A PEFT and its kin compute without dilation"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": "same", "kernel_size": (3, 2)}, r"a kernel of \(3, 2\), padded more on one side"),
    ],
    ids=["grouped", "dilated", "reflect", "same with an even kernel"],
)
def test_convolution_that_cannot_be_adapted_is_refused(how, why):
    with pytest.raises(AdapterError, match=f"0 can't be adapted: a convolution .*{why}"):
        with_adapter(nn.Sequential(nn.Conv2d(4, 6, **{"kernel_size": 3} | how)), trained=(), targets=[TargetLayer("0")])


def test_name_taken_no_name_and_no_targets_are_errors():
    adapters = with_adapter(vit())
    with pytest.raises(AdapterError, match="'birds' is there already"):
        adapters.add("birds", BOTH_QKV, SETTINGS)
    with pytest.raises(AdapterError, match="no adapter named 'fish'; there is birds"):
        adapters.activate("fish")
    with pytest.raises(AdapterError, match="no layers"):
        adapters.add("fish", [], SETTINGS)
    assert adapters.names == ["birds"]
    assert adapters.active == "birds"


@pytest.mark.parametrize(
    ("a", "b", "wrong"),
    [((4, 32), (144, 4), "lora_A has shape \\[4, 32\\], the model needs \\[4, 48\\]"), ((4, 48), (96, 4), "lora_B")],
)
def test_adapter_of_another_architecture_is_refused_and_leaves_the_model_as_it_was(a, b, wrong):
    model = vit()
    before = state(model)
    adapters = Adapters(model)
    weights = LowRankWeights(torch.ones(a), torch.ones(b), 4, 4.0, 144)
    with pytest.raises(AdapterError, match=f"blocks.0.attn.qkv.{wrong}"):
        adapters.load("alien", Adapter({"blocks.0.attn.qkv": weights}))
    assert adapters.names == []
    assert same_bits(before, state(model))


def test_head_of_another_width_is_refused():
    value = with_adapter(vit()).adapter("birds")
    for weight in (torch.ones(5, 32), torch.ones(4, 32), torch.ones(5)):
        head = {"weight": weight, "bias": torch.ones(len(weight))}
        with pytest.raises(AdapterError, match="the adapter's head doesn't fit"):
            Adapters(vit()).load("alien", Adapter(value.layers, {"head": head}))


def test_model_without_numbers_takes_none():
    value = with_adapter(vit()).adapter("birds")
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv is on the meta device"):
        Adapters(vit().to("meta")).load("lost", value)


def test_head_without_bias_stays_without_bias(images):
    value = with_adapter(vit()).adapter("birds")
    weight = value.trained["head"]["weight"]
    model = vit()
    Adapters(model).load("birds", Adapter(value.layers, {"head": {"weight": weight}}))
    assert model.head.bias is None
    assert torch.allclose(model(images), model.forward_head(model.forward_features(images), True) @ weight.t())


def test_two_adapters_objects_on_one_model_are_refused():
    model = vit()
    with_adapter(model)
    with pytest.raises(AdapterError, match="holds adapters already"):
        Adapters(model)


def test_adapter_of_another_adapters_object_stays_as_it_was_when_one_is_refused(images):
    model = vit()
    first = with_adapter(model, trained=())
    first.deactivate()
    second = with_adapter(model, "cats", trained=())
    wanted = model(images)
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv is adapted already, by another Adapters object"):
        first.activate("birds")
    assert torch.equal(model(images), wanted)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(AdapterError, match="by another Adapters object"):
        first.add("dogs", BOTH_QKV, SETTINGS)
    assert first.names == ["birds"]
    second.remove("cats")
    first.remove("birds")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "head"])
@pytest.mark.parametrize("step", ["merge", "merge_and_unload", "deactivate", "remove", "adapter", "unmerge"])
def test_layer_that_was_replaced_beside_an_adapter_is_named_and_left_alone(path, step):
    model = vit()
    adapters = with_adapter(model)
    if step == "unmerge":
        adapters.merge()
    new = nn.Linear(48, 144 if path.endswith("qkv") else 7)
    weight, old = new.weight.clone(), model.get_submodule(path)
    model.set_submodule(path, new)
    with pytest.raises(
        AdapterError, match=rf"{path} was replaced, or adapted by another Adapters object or PEFT, since"
    ):
        getattr(adapters, step)(*(["birds"] if step in ("remove", "adapter") else []))
    assert torch.equal(new.weight, weight)
    model.set_submodule(path, old)
    adapters.remove("birds")
    assert same_bits(state(model), state(vit()))


@pytest.mark.parametrize("step", ["merge", "unmerge", "deactivate", "remove"])
def test_layer_hooked_beside_an_adapter_is_left_as_it_is_until_the_hook_is_off(images, step):
    model = vit()
    before, adapters = state(model), with_adapter(model)
    if step == "unmerge":
        adapters.merge()
    logits, layer = model(images), model.blocks[0].attn.qkv
    add_hook_to_module(layer, ModelHook())  # which goes on calling the forward that it found
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has a forward of its own, as"):
        getattr(adapters, step)(*(["birds"] if step == "remove" else []))
    assert torch.equal(model(images), logits)
    remove_hook_from_module(layer)
    adapters.remove("birds")
    assert same_bits(before, state(model))
    assert model(images).isfinite().all()


def test_hooked_layer_is_refused_until_the_hook_is_off(images):
    model = vit()
    adapters, layer = Adapters(model), model.blocks[0].attn.qkv
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has a forward of its own, as"):
        adapters.add("birds", BOTH_QKV, SETTINGS)
    remove_hook_from_module(layer)
    logits = model(images)
    adapters.add("birds", BOTH_QKV, SETTINGS)
    train(model)
    assert not torch.allclose(model(images), logits)
    adapters.deactivate()
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has a forward of its own, as"):
        adapters.activate("birds")
    assert torch.equal(model(images), logits)


def test_flags_come_back_as_they_were_before_the_first_adapter():
    model = vit()
    adapters = Adapters(model)
    model.patch_embed.requires_grad_(False)
    adapters.add("birds", BOTH_QKV, SETTINGS)
    adapters.remove("birds")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_hooks_of_a_module_act_on_the_adapters_copy_too(images):
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def record(self, module, args, output) -> None:
            self.seen.append(output)

    model, recorder = vit(), Recorder()
    handle = model.head.register_forward_hook(recorder.record)
    model(images)  # what was recorded can't be copied
    adapters = with_adapter(model)
    adapters.load("cats", trained_value(5, 3, images)[0])
    found = [model(images)]
    adapters.activate("birds")
    found.append(model(images))
    assert [torch.equal(*pair) for pair in zip(recorder.seen[1:], found, strict=True)] == [True, True]
    handle.remove()
    model(images)
    assert len(recorder.seen) == 3
    named = []
    model.head.register_forward_hook(lambda module, args, kwargs, output: named.append(kwargs), with_kwargs=True)
    adapters.deactivate()
    model(images)
    assert named == [{}]


def test_second_adapters_object_on_a_merged_model_is_refused():
    model = vit()
    with_adapter(model).merge()
    with pytest.raises(AdapterError, match="holds adapters already"):
        Adapters(model)


def test_target_inside_a_fully_trained_module_is_refused():
    with pytest.raises(AdapterError):
        Adapters(vit()).add("birds", BOTH_QKV, SETTINGS, ["blocks.1"])


def test_fully_trained_module_inside_another_is_refused():
    with pytest.raises(AdapterError, match=r"blocks\.1\.mlp\.fc1 is part of blocks\.1\.mlp"):
        Adapters(vit()).add("birds", BOTH_QKV, SETTINGS, trained=["blocks.1.mlp", "blocks.1.mlp.fc1"])


def test_one_module_under_two_names_is_refused():
    model = vit()
    model.same = model.blocks[0].attn.proj
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.proj and same are one module"):
        Adapters(model).add("birds", [TargetLayer("blocks.0.attn.proj"), TargetLayer("same")], SETTINGS)


def test_computed_weight_is_refused():
    model = vit()
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.proj)
    nn.utils.prune.l1_unstructured(model.blocks[1].attn.proj, "weight", 0.5)
    with pytest.raises(AdapterError, match=r"blocks\.1\.attn\.proj computes its weight"):
        Adapters(model).add("birds", [TargetLayer("blocks.1.attn.proj")], SETTINGS)
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.proj is a Parametrized"):
        Adapters(model).add("birds", [TargetLayer("blocks.0.attn.proj")], SETTINGS)


def test_adapter_is_not_activated_where_a_weight_has_become_a_computed_one(images):
    model = vit()
    adapters = with_adapter(model)
    wanted = model(images)
    adapters.deactivate()
    with pytest.raises(AdapterError, match="no adapter named None; there is birds"):
        adapters.adapter(adapters.active)
    nn.utils.prune.identity(model.blocks[1].attn.qkv, "weight")
    with pytest.raises(AdapterError, match=r"blocks\.1\.attn\.qkv computes its weight"):
        adapters.activate("birds")
    nn.utils.prune.remove(model.blocks[1].attn.qkv, "weight")
    adapters.activate("birds")
    assert torch.equal(model(images), wanted)


def test_head_of_a_half_precision_model_with_other_classes_stays_in_half_precision(images):
    saved = with_adapter(vit(3).bfloat16()).adapter("birds")
    model = vit(5).bfloat16()
    Adapters(model).load("birds", saved)
    assert model(images.bfloat16()).shape == (3, 3)


def test_fully_trained_module_without_parameters_is_refused_or_harmless():
    model = vit(classes=0)
    try:
        Adapters(model).add("birds", BOTH_QKV, SETTINGS, ["head"])
    except AdapterError as error:
        assert "head" in str(error)  # noqa: PT017


def test_rows_past_the_layers_end_are_refused():
    with pytest.raises(AdapterError):
        Adapters(vit()).add("birds", [TargetLayer("blocks.0.attn.qkv", ((96, 192),))], SETTINGS)


def test_pattern_that_fits_no_adapted_layer_is_refused():
    for patterns in ({"rank_pattern": {"qk": 2}}, {"alpha_pattern": {"blocks.7.attn.qkv": 2.0}}):
        with pytest.raises(AdapterError, match=r"fits none of the 2 adapted layers: blocks\.0"):
            Adapters(vit()).add("birds", BOTH_QKV, LoraSettings(4, 6.0, **patterns))
    with pytest.raises(AdapterError, match=r"'qkv\(' isn't a regular expression"):
        Adapters(vit()).add("birds", BOTH_QKV, LoraSettings(4, 6.0, rank_pattern={"qkv(": 2}))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_pattern_behind_one_that_fits_all_of_its_layers_is_refused(key):
    patterns = {r"1\.attn\.qkv": 2, "qkv": 3}
    Adapters(vit()).add("birds", BOTH_QKV, LoraSettings(4, 6.0, **{key: patterns}))
    with pytest.raises(AdapterError, match=r"is without effect: 'qkv' comes before it"):
        Adapters(vit()).add("birds", BOTH_QKV, LoraSettings(4, 6.0, **{key: dict(reversed(patterns.items()))}))


def test_each_adapter_has_its_own_biases_and_the_base_gets_its_back(images):
    model = vit()
    before, logits = state(model), model(images)
    adapters = Adapters(model)
    found = {}
    for name, bias in (("some", "lora_only"), ("all", "all")):
        adapters.add(name, BOTH_QKV, LoraSettings(4, 6.0, bias=bias), ["head"])
        train(model, seed=len(name))
        found[name] = model(images)
        assert not torch.allclose(found[name], logits, atol=1e-2)
    for name in ("some", "all", "some"):
        adapters.activate(name)
        assert torch.equal(model(images), found[name])
    assert adapters.adapter("some").biases.keys() == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}
    assert "head.bias" not in adapters.adapter("all").biases  # it is trained with the head
    copy_of = adapters.adapter("all")
    other = vit()
    Adapters(other).load("all", copy_of)
    assert torch.equal(other(images), found["all"])
    adapters.remove("some")
    adapters.remove("all")
    assert same_bits(state(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(images), logits)


def test_bias_of_another_model_or_of_none_is_refused(images):
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(AdapterError, match="bias=lora_only: none of the layers concerned has a bias"):
        Adapters(bare).add("birds", [TargetLayer("0")], LoraSettings(2, 2.0, bias="lora_only"))
    normed = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    with pytest.raises(AdapterError, match=r"bias=all: .* has a bias outside of 1, trained in full; set it to none"):
        Adapters(normed).add("birds", [TargetLayer("0")], LoraSettings(2, 2.0, bias="all"), ["1"])
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = Adapters(model)
    adapters.add("birds", [TargetLayer("0")], LoraSettings(2, 2.0, bias="lora_only"))
    value = adapters.adapter("birds")
    with pytest.raises(AdapterError, match="0 has no bias: a wrong name, or another model's adapter"):
        Adapters(nn.Sequential(nn.Linear(4, 4, bias=False))).load("birds", value)
    value.biases["0.bias"] = torch.ones(3)
    with pytest.raises(AdapterError, match=r"0.bias has shape \[3\], the model needs \[4\]"):
        Adapters(nn.Sequential(nn.Linear(4, 4))).load("birds", value)


def test_biases_are_asked_for_in_one_of_three_words():
    with pytest.raises(ValueError, match="bias is 'lora-only', expected one of none, lora_only, all"):
        LoraSettings(2, 2.0, bias="lora-only")


@pytest.mark.parametrize("wrapper", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_wrapper_is_refused_with_what_to_adapt_instead(wrapper):
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = wrapper(model)
    with pytest.raises(AdapterError, match=r"adapt its \.(_orig_mod|module), ") as refused:
        Adapters(wrapped)
    inner = re.search(r"its \.(\w+),", str(refused.value)).group(1)
    Adapters(getattr(wrapped, inner)).add("it", [TargetLayer("0")], LoraSettings(2, 2.0))
    x = torch.randn(3, 8)
    nn.init.normal_(model[0].lora.lora_B)
    torch.testing.assert_close(wrapped(x), model(x))


@pytest.mark.parametrize("rank", [0, "8", 2.5])
def test_ranks_are_whole_numbers(rank):
    for settings in (LoraSettings(rank, 4.0), LoraSettings(2, 4.0, rank_pattern={"0": rank})):
        with pytest.raises(AdapterError, match=rf"rank={rank!r}, dropout=0\.0: rank must be a whole number from 1 on"):
            Adapters(nn.Sequential(nn.Linear(4, 4))).add("it", ["0"], settings)


def test_ranks_end_with_the_longer_side_of_a_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(2, 3, 3))
    adapters = Adapters(model)
    adapters.add("most", ["0", "1"], LoraSettings(6, 4.0, rank_pattern={"1": 18}))
    for name, rank, side in (("0", 7, 6), ("1", 19, 18)):
        with pytest.raises(AdapterError, match=rf"rank {rank} for {name}, whose weight .* no side longer than {side};"):
            adapters.add("more", [name], LoraSettings(rank, 4.0))


def test_layers_are_named_in_a_list_and_by_what_the_model_has():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = Adapters(model)
    for arguments, message in (
        (("0", LoraSettings(2, 4.0)), "targets='0': expected names in a list, ['0']"),
        ((["0"], LoraSettings(2, 4.0), "1"), "trained='1': expected names in a list, ['1']"),
        ((["0"], LoraSettings(2, 4.0), ["head"]), "Sequential has no module 'head': a wrong name, or another model's"),
    ):
        with pytest.raises(AdapterError, match=re.escape(message)):
            adapters.add("it", *arguments)
    adapters.add("it", ["1"], LoraSettings(2, 4.0))
    assert [*adapters.adapter("it").layers] == ["1"]
