"""A batch in which each sample has its own adapter gives each what it gets alone, forwards and backwards."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapter, Adapters, LoraSettings, LowRankWeights, TargetLayer, frozen_weight
from vislora.targets.timm import find_targets

KINDS = {
    "lora": LoraSettings(4, 8),
    "rslora": LoraSettings(3, 6, rslora=True),
    "dora": LoraSettings(2, 6, dora=True),
    "pissa": LoraSettings(2, 4, pissa=True),
}


def fill(model: nn.Module) -> None:
    """Random numbers in everything trainable, as training would leave them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))


def vit() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **size).eval()


def four_tasks() -> Adapters:
    """One adapter of each kind, on other projections, with heads of 5, 3 and 8 classes; rslora has none."""
    model = vit()
    adapters = Adapters(model)
    for name, projections, classes in [
        ("lora", ["qkv", "o"], 5),
        ("rslora", ["q", "v"], None),
        ("dora", ["q", "k", "mlp"], 3),
        ("pissa", ["v", "o"], 8),
    ]:
        adapters.deactivate()
        base = model.head
        if classes:
            model.head = nn.Linear(48, classes)
        adapters.add(name, find_targets(model, projections), KINDS[name], ["head"] if classes else [])
        fill(model)
        adapters.deactivate()
        model.head = base
    return adapters


def alone(adapters: Adapters, names: list, images: Tensor) -> list[Tensor]:
    outputs = []
    for name, image in zip(names, images.split(len(images) // len(names)), strict=True):
        if name is None:
            adapters.deactivate()
        else:
            adapters.activate(name)
        outputs.append(adapters.model(image))
    adapters.deactivate()
    return outputs


NAMES = ["dora", "lora", None, "pissa", "dora", "rslora", "lora"]


def test_logits_of_a_mixed_batch_are_those_of_each_sample_alone():
    adapters, images = four_tasks(), torch.randn(7, 3, 32, 32)
    wanted = alone(adapters, NAMES, images)
    with adapters.per_sample(NAMES):
        logits = adapters.model(images)
    assert logits.shape == (7, 8)
    for mine, own in zip(logits, wanted, strict=True):
        classes = own.shape[1]
        assert torch.allclose(mine[:classes], own[0], atol=1e-5)
        assert (mine[classes:] == -torch.inf).all()
    different = {round(float(own[0, 0].detach()), 4) for own in wanted}
    assert len(different) == 7


def test_each_adapter_gets_the_gradients_of_its_own_samples():
    adapters, images = four_tasks(), torch.randn(7, 3, 32, 32)
    labels = torch.tensor([2, 4, 0, 7, 1, 3, 0])
    losses = [
        F.cross_entropy(own, label[None]) for own, label in zip(alone(adapters, NAMES, images), labels, strict=True)
    ]
    held = {name: adapters._held[name] for name in adapters.names}
    own = {
        name: [p for low in one.layers.values() for p in low.parameters()]
        + [p for module in one.trained.values() for p in module.parameters()]
        for name, one in held.items()
    }
    wanted = {
        name: torch.autograd.grad(
            sum(loss for loss, its in zip(losses, NAMES, strict=True) if its == name), parameters, retain_graph=True
        )
        for name, parameters in own.items()
    }
    with adapters.per_sample(NAMES):
        inside = {id(p) for p in adapters.model.parameters() if p.requires_grad}
        F.cross_entropy(adapters.model(images), labels, reduction="sum").backward()
    assert inside == {id(p) for parameters in own.values() for p in parameters}
    for name, parameters in own.items():
        for p, grad in zip(parameters, wanted[name], strict=True):
            assert torch.allclose(p.grad, grad, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in adapters.model.parameters())  # the base model's


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spread = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.qkv = nn.Conv2d(8, 12, 1, bias=False)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.qkv(self.spread(x).tanh()).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_and_parts_of_them(kind):
    model, images = Convolutions(), torch.randn(4, 3, 8, 8)
    adapters = Adapters(model)
    whole = [TargetLayer("spread"), TargetLayer("fc")]
    adapters.add("one", [TargetLayer("qkv", ((0, 4), (8, 12))), *whole], KINDS[kind])
    fill(model)
    adapters.add("other", [TargetLayer("qkv"), TargetLayer("spread", ((2, 5),))], KINDS["lora"])
    fill(model)
    names = ["other", "one", None, "one"]
    wanted = torch.cat(alone(adapters, names, images))
    grads = torch.autograd.grad(wanted.square().sum(), list(adapters._held["one"].layers["qkv"].parameters()))
    with adapters.per_sample(names):
        found = model(images)
    assert torch.allclose(found, wanted, atol=1e-5)
    mine = torch.autograd.grad(found.square().sum(), list(adapters._held["one"].layers["qkv"].parameters()))
    for one, other in zip(mine, grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_windows_folded_into_the_batch_belong_to_their_sample(kind):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, depths=(1, 2), num_heads=(2, 2), embed_dim=16
    )
    model.eval()
    adapters = Adapters(model)
    targets = [TargetLayer(name) for name, _ in model.named_modules() if name.endswith((".qkv", "mlp.fc1"))]
    for name in ("one", "other"):
        adapters.add(name, targets, KINDS[kind])
        fill(model)
    images, names = torch.randn(3, 3, 224, 224), ["other", None, "one"]
    wanted = torch.cat(alone(adapters, names, images))
    with adapters.per_sample(names):
        assert torch.allclose(model(images), wanted, atol=1e-4)


# Weights that are read, class attention, cross-covariance, 1x1 convolutions, folded patches, pooled keys, windows.
FAMILIES = {
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "xcit_nano_12_p16_224": {"img_size": 64},
    "efficientvit_b0": {},
    "mobilevit_xxs": {},
    "pvt_v2_b0": {},
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "window_size": 4,
        "depths": (1, 2),
        "num_heads": (2, 2),
        "embed_dim": 16,
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_each_sample_what_it_gets_alone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **FAMILIES[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() < 0.02:  # gammas that start at nearly zero would hide a difference
                p.normal_(std=0.3)
    adapters = Adapters(model)
    for kind in ("lora", "dora"):
        adapters.add(kind, find_targets(model, ["qkv", "o"]), KINDS[kind])
        fill(model)
    size = FAMILIES[name].get("img_size", model.pretrained_cfg["input_size"][-1])
    images, names = torch.randn(3, 3, size, size), ["dora", None, "lora"]
    adapters.deactivate()
    with torch.no_grad():
        base, wanted = model(images), torch.cat(alone(adapters, names, images))
        with adapters.per_sample(names):
            found = model(images)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert (base - wanted).abs().amax(1).gt(1e-3 * wanted.abs().max()).tolist() == [True, False, True]


class Patches(nn.Module):
    """A convolution and a norm over the quarters of each picture, folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        quarters = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.norm(self.conv(quarters)).unflatten(0, (len(x), 4))


def test_convolutions_and_trained_modules_see_windows_too():
    adapters = Adapters(model := Patches().eval())
    for name in ("one", "other"):
        adapters.add(name, [TargetLayer("conv")], KINDS["dora"], ["norm"])
        fill(model)
    images, names = torch.randn(3, 3, 8, 8), ["other", None, "one"]
    wanted = torch.cat(alone(adapters, names, images))
    with adapters.per_sample(names):
        assert torch.allclose(model(images), wanted, atol=1e-5)


class ReadsTheSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t()


def test_a_weight_that_is_read_as_a_whole_is_refused_by_name():
    adapters = Adapters(model := ReadsTheSum())
    adapters.add("one", [TargetLayer("fc")], KINDS["lora"])
    with adapters.per_sample(["one", None]), pytest.raises(AdapterError, match="the weight of fc is read as a whole"):
        model(torch.randn(2, 3, 6))
    adapters.add("other", [TargetLayer("attention")], KINDS["lora"])
    with pytest.raises(AdapterError, match=r"attention \(MultiheadAttention\) can't have an adapter for each sample"):
        adapters.per_sample(["other", None]).__enter__()
    assert adapters.active == "other"


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_leaves_the_expectation_and_samples_without_it_alone(kind, dora):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 1)
    x = torch.randn(1, 6) if kind == "linear" else torch.randn(1, 6, 1, 1)
    model = nn.Sequential(layer)
    adapters = Adapters(model)
    adapters.add("steady", [TargetLayer("0")], LoraSettings(2, 4))
    fill(model)
    adapters.add("dropping", [TargetLayer("0")], LoraSettings(2, 4, dropout=0.4, dora=dora))
    fill(model)
    model.eval()
    wanted = [own.detach() for own in alone(adapters, ["dropping", "steady"], torch.cat([x, x]))]
    names = ["dropping"] * 20000 + ["steady"] * 10
    with adapters.per_sample(names):
        model.train()
        y = model(x.expand(len(names), *x.shape[1:])).detach()
        model.eval()
        assert torch.allclose(model(x.expand(len(names), *x.shape[1:]))[:1], wanted[0], atol=1e-5)
    assert torch.allclose(y[20000:], wanted[1].expand_as(y[20000:]), atol=1e-5)
    spread = y[:20000].std(0)
    assert (spread > 0.05).any()
    assert ((y[:20000].mean(0) - wanted[0][0]).abs() <= 5 * spread / 20000**0.5 + 1e-4).all()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_takes_an_input_from_all_that_the_adapter_adds_and_from_nothing_else(kind, dora):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 1)
    x = F.one_hot(torch.tensor(2), 6).float().view(1, 6, *[1] * (layer.weight.dim() - 2))  # dropped, or it isn't
    adapters = Adapters(model := nn.Sequential(layer))
    base = model(x).detach()
    adapters.add("it", [TargetLayer("0")], LoraSettings(2, 4, dropout=0.4, dora=dora))
    fill(model)
    added = model.eval()(x).detach() - base
    with adapters.per_sample(["it"] * 50):
        found = model.train()(x.expand(50, *x.shape[1:])).detach() - base
    kept = found.flatten(1).norm(dim=1) > 1e-5
    assert 0 < kept.sum() < 50
    assert torch.allclose(found[kept], (added / 0.6).expand_as(found[kept]), atol=1e-5)


def test_each_number_of_each_sample_is_dropped_by_itself():
    torch.manual_seed(0)
    adapters = Adapters(model := nn.Sequential(nn.Linear(3, 3)))
    adapters.add("it", [TargetLayer("0")], LoraSettings(2, 4, dropout=0.4))
    x = torch.ones(5000, 2, 3)
    with adapters.per_sample(["it"] * len(x)):
        dropped = model[0].lora.dropped(x, torch.zeros(len(x), dtype=torch.long)).flatten(1)
    assert torch.allclose(dropped.T.cov(), 0.4 / 0.6 * torch.eye(6), atol=0.06)


def test_a_mixed_batch_is_what_peft_computes():
    peft = pytest.importorskip("peft")
    model, adapters = None, Adapters(mine := Convolutions())
    for name, rank, alpha in (("one", 2, 6), ("two", 3, 5)):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["spread", "fc"], init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(Convolutions(), config, name)
        else:
            model.add_adapter(name, config)
        layers = {}
        for path in ("spread", "fc"):
            low = model.base_model.model.get_submodule(path)
            a, b = low.lora_A[name].weight.detach(), low.lora_B[name].weight.detach()
            layers[path] = LowRankWeights(a, b, rank, alpha, b.shape[0])
        adapters.load(name, Adapter(layers))
    images = torch.randn(5, 3, 8, 8)
    theirs = model.eval()(images, adapter_names=["two", "one", "__base__", "two", "one"])
    with adapters.per_sample(["two", "one", None, "two", "one"]):
        assert torch.allclose(mine(images), theirs, atol=1e-5)


def test_autocast_computes_the_products_in_bfloat16():
    adapters, images = four_tasks(), torch.randn(7, 3, 32, 32)
    with adapters.per_sample(NAMES):
        exact = adapters.model(images)
        with torch.autocast("cpu", torch.bfloat16):
            logits = adapters.model(images)
            assert adapters.model.blocks[0].attn.qkv(torch.randn(7, 5, 48)).dtype == torch.bfloat16
    own = exact.isfinite()
    assert (logits - exact)[own].abs().max() < 0.05 * exact[own].abs().max()
    logits[own].sum().backward()


def test_lengths_of_doras_rows_are_computed_in_float32_under_autocast():
    layer = nn.Linear(64, 32, bias=False)
    adapters = Adapters(nn.Sequential(layer))
    adapters.add("dora", [TargetLayer("0")], KINDS["dora"])
    low = layer.lora
    with torch.no_grad():  # the pair takes nearly all of the weight away
        nn.init.normal_(low.lora_B)
        frozen_weight(layer).copy_(-3.03 * low.lora_B @ low.lora_A)
    wanted = low.magnitude / (0.03 * low.lora_B.double() @ low.lora_A.double()).norm(dim=1)
    with adapters.per_sample(["dora", None]), torch.autocast("cpu", torch.bfloat16):
        gains = layer.lora.gains(frozen_weight(layer))
    assert torch.allclose(gains[0].double(), wanted, rtol=0.01)
    assert torch.equal(gains[1], torch.ones(32))


def test_dropout_is_off_in_a_model_that_was_in_eval_mode_before():
    model = nn.Sequential(nn.Linear(6, 6)).eval()
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0")], LoraSettings(2, 4, dropout=0.5))
    fill(model)
    x = torch.randn(2, 6)
    wanted = model(x)
    with adapters.per_sample(["it", "it"]):
        assert torch.allclose(model(x), wanted, atol=1e-6)


def test_the_model_is_left_as_it_was_and_the_active_adapter_is_back():
    adapters, images = four_tasks(), torch.randn(2, 3, 32, 32)
    adapters.activate("dora")
    model = adapters.model
    before, modules = model(images), {name: (id(m), type(m)) for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with adapters.per_sample(["lora", "pissa"]):
        model(images)
    with pytest.raises(RuntimeError, match="stop"), adapters.per_sample(["lora", "pissa"]):
        raise RuntimeError("stop")
    assert adapters.active == "dora"
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == modules
    assert torch.equal(model(images), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in after.items())


def test_a_scaled_adapter_keeps_its_strength():
    adapters, images = four_tasks(), torch.randn(2, 3, 32, 32)
    adapters.scale("dora", 0.3)
    wanted = alone(adapters, ["dora", "lora"], images)
    with adapters.per_sample(["dora", "lora"]):
        assert torch.allclose(adapters.model(images)[0, :3], wanted[0][0], atol=1e-5)


def test_mode_chosen_meanwhile_stays():
    adapters = four_tasks()
    adapters.activate("lora")
    model = adapters.model.train()
    with adapters.per_sample(["lora", "pissa"]):
        model.eval()
    assert not any(module.training for module in model.modules())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states)


def test_batch_given_by_keyword_is_checked_too():
    adapters = Adapters(ByKeyword())
    adapters.add("one", [TargetLayer("block.0")], KINDS["lora"])
    with adapters.per_sample(["one", None]), pytest.raises(AdapterError, match=r"an input of \[4, 8\] for 2 adapter"):
        adapters.model(hidden_states=torch.randn(4, 8))


def test_layer_inside_a_module_that_another_adapter_trains_is_refused():
    adapters = Adapters(ByKeyword())
    adapters.model.other = nn.Linear(8, 8)
    adapters.add("whole", [TargetLayer("other")], KINDS["lora"], trained=["block"])
    adapters.add("inside", [TargetLayer("block.0")], KINDS["lora"])
    with (
        pytest.raises(AdapterError, match=r"block\.0 is adapted, .* part of block"),
        adapters.per_sample(["whole", "inside"]),
    ):
        pass


def test_module_inside_one_that_another_adapter_trains_is_refused():
    adapters = Adapters(ByKeyword())
    adapters.model.other = nn.Linear(8, 8)
    adapters.add("whole", [TargetLayer("other")], KINDS["lora"], trained=["block"])
    adapters.add("inside", [TargetLayer("other")], KINDS["lora"], trained=["block.0"])
    with (
        pytest.raises(AdapterError, match=r"block\.0 is .* trained in full, .* part of block"),
        adapters.per_sample(["whole", "inside"]),
    ):
        pass


def test_mistakes_are_named():
    adapters, images = four_tasks(), torch.randn(4, 3, 32, 32)
    model = adapters.model
    with pytest.raises(AdapterError, match="no adapter named 'fish'"), adapters.per_sample(["lora", "fish"]):
        pass
    with adapters.per_sample(["lora", None]):
        with pytest.raises(AdapterError, match=r"VisionTransformer gets an input of \[4, .* for 2 adapter names"):
            model(images)
        with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv gets \[3, 5, 48\] for a batch of 2"):
            model.blocks[0].attn.qkv(torch.randn(3, 5, 48))
        with pytest.raises(AdapterError, match="leave per_sample before adding or switching"):
            adapters.activate("dora")
        with pytest.raises(AdapterError, match="leave per_sample before adding or switching"):
            adapters.remove("lora")
        with pytest.raises(AdapterError, match="leave per_sample before adding or switching"):
            adapters.add("new", find_targets(model, ["q"]), KINDS["lora"])
    assert "new" not in adapters.names
    adapters.activate("lora")
    adapters.merge()
    with pytest.raises(AdapterError, match="merged into the weights; unmerge first"), adapters.per_sample(["lora"]):
        pass
    adapters.unmerge()
    adapters.add("biased", find_targets(model, ["q"]), LoraSettings(2, 4, bias="lora_only"))
    with pytest.raises(AdapterError, match="'biased' trains biases"), adapters.per_sample(["biased", "lora"]):
        pass
    assert torch.isfinite(model(images)).all()


def test_blending_adds_an_adapter_that_acts_like_the_weighted_sum():
    model, images = Convolutions(), torch.randn(4, 3, 8, 8)
    base = {name: model.get_submodule(name).weight.clone() for name in ("spread", "fc")}
    adapters, deltas = Adapters(model), {}
    for name, rank in (("one", 2), ("two", 3)):
        adapters.add(name, [TargetLayer("spread"), TargetLayer("fc")], LoraSettings(rank, 4))
        fill(model)
        adapters.merge()
        deltas[name] = {path: model.get_submodule(path).weight - weight for path, weight in base.items()}
        adapters.unmerge()
    energy = adapters.blend("both", {"one": 0.7, "two": -0.2}, how="cat")
    assert adapters.active == "both"
    assert energy == {"spread": 1.0, "fc": 1.0}
    wanted = Convolutions()
    with torch.no_grad():
        for path in base:
            wanted.get_submodule(path).weight.add_(0.7 * deltas["one"][path] - 0.2 * deltas["two"][path])
    assert torch.allclose(model(images), wanted(images), atol=1e-5)
    assert all(share < 1 for share in adapters.blend("small", {"one": 0.7, "two": -0.2}, "svd", rank=1).values())
    with pytest.raises(AdapterError, match="head='three' is none of the blended"):
        adapters.blend("more", {"one": 1, "two": 1}, head="three")


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_block_trained_in_full_gets_what_else_its_model_gives_it(name):  # positions, biases, masks by keyword
    torch.manual_seed(0)
    swin = name.startswith("swin")
    size = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2)} if swin else {"depth": 2, "embed_dim": 48}
    size |= {} if swin else {"num_heads": 3}
    model = timm.create_model(name, num_classes=5, img_size=56 if swin else 32, **size).eval()
    block = "layers.0.blocks.1.attn" if swin else "blocks.1"
    adapters = Adapters(model)
    for task in ("a", "b"):
        targets = [one for one in find_targets(model, ["q", "v"]) if not one.name.startswith(block)]
        adapters.add(task, targets, LoraSettings(2, 4.0), [block])
        fill(model)
    names, images = ["a", "b", "b", None, "a"], torch.randn(5, 3, *(2 * [56 if swin else 32]))
    wanted = torch.cat(alone(adapters, names, images))
    with adapters.per_sample(names), torch.no_grad():
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-4)


def test_a_second_tensor_that_may_hold_samples_is_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(self.first(x), x)

    adapters = Adapters(Two())
    for task in ("a", "b"):
        adapters.add(task, [TargetLayer("first")], LoraSettings(2, 4.0), ["both"])
    with adapters.per_sample(["a", "a"]):
        adapters.model(torch.randn(2, 4))
    with adapters.per_sample(["a", "b"]), pytest.raises(AdapterError, match="both gets a second tensor of 2 rows"):
        adapters.model(torch.randn(2, 4))


def test_a_blend_takes_the_head_that_is_named():
    adapters = four_tasks()
    with pytest.raises(AdapterError, match="different fully trained modules"):
        adapters.blend("both", {"lora": 0.5, "pissa": 0.5})
    adapters.blend("both", {"lora": 0.5, "pissa": 0.5}, head="pissa")
    assert adapters.model(torch.randn(2, 3, 32, 32)).shape == (2, 8)


class Tower(nn.Module):
    """A block of a CLIP tower, images [B, 4, 8] -> [B, 4, 8], which may put the sequence first inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attn.batch_first else x.transpose(0, 1)
        x = self.mlp(x + self.attn(x, x, x, need_weights=False)[0])
        return x if self.attn.batch_first else x.transpose(0, 1)


def test_sequence_before_the_batch_is_refused():
    for batch_first in (True, False):
        model = Tower(batch_first)
        adapters = Adapters(model)
        for name in ("one", "two"):
            adapters.add(name, [TargetLayer("mlp")], LoraSettings(2, 4))
            fill(model)
        images = torch.randn(2, 4, 8)  # a sequence of 4, which would divide into 2 samples
        if batch_first:
            with adapters.per_sample(["one", "two"]):
                outputs = model(images)
            torch.testing.assert_close(outputs, torch.cat(alone(adapters, ["one", "two"], images)))
        else:
            with pytest.raises(AdapterError, match="attn has batch_first=False"), adapters.per_sample(["one", "two"]):
                pass
            assert adapters.active == "two"
