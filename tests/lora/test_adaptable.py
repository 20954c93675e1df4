"""Adapters act beside layers that keep their weight to themselves, as quantised ones do."""

import copy

import pytest
import timm
import torch
from quantised import Codes, quantise
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.formats.peft import write_peft
from vislora.lora import Adapter, Adapters, LoraSettings, LowRankWeights, TargetLayer, prove_alive
from vislora.targets.timm import find_targets

SETTINGS = LoraSettings(rank=4, alpha=6.0)


@pytest.fixture(params=["class", "weight"])
def make(request):
    """Builds the same quantised ViT each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            size = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
            model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **size).eval().requires_grad_(False)
        return quantise(model, request.param, lambda name: name.startswith("blocks"))

    return build


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def adapted(model: nn.Module, settings: LoraSettings = SETTINGS) -> Adapters:
    """With an adapter on q, v, o and the MLPs, as training might have left it."""
    adapters = Adapters(model)
    adapters.add("a", find_targets(model, ["q", "v", "o", "mlp"]), settings)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return adapters


def test_output_and_gradients_are_pefts(make, images, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    plain = model(images)
    adapters = adapted(model)
    y = model(images)
    write_peft(adapters.adapter("a"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path), is_trainable=True).eval()
    assert (y - plain).abs().max() > 0.05
    torch.testing.assert_close(y, theirs(images), rtol=0, atol=1e-5)
    y.square().sum().backward()
    theirs(images).square().sum().backward()
    fused = [n for n, p in theirs.named_parameters() if p.requires_grad and "attn.proj" in n]
    assert len(fused) == 4
    for name in fused:
        mine = name.removeprefix("base_model.model.").replace("lora_A.default.weight", "lora.lora_A")
        mine = mine.replace("lora_B.default.weight", "lora.lora_B")
        torch.testing.assert_close(
            model.get_parameter(mine).grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-5
        )


def test_untrained_adapter_changes_nothing_and_is_alive_and_leaves_nothing_behind(make, images):
    model = make()
    plain = model(images)
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    adapters = Adapters(model)
    adapters.add("a", find_targets(model, ["qkv", "o"]), SETTINGS)
    assert torch.equal(model(images), plain)
    prove_alive(model, lambda: model(images))
    adapters.remove("a")
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(model(images), plain)


def test_scale_and_switching_act(make, images):
    model = make()
    plain = model(images)
    adapters = adapted(model)
    trained = model(images)
    adapters.scale("a", 0.0)
    torch.testing.assert_close(model(images), plain)
    adapters.scale("a", 1.0)
    adapters.deactivate()
    assert torch.equal(model(images), plain)
    adapters.activate("a")
    assert torch.equal(model(images), trained)


def test_dropout_acts_in_training_alone(make, images):
    model = make()
    adapted(model, LoraSettings(rank=4, alpha=6.0, dropout=0.5))
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_what_needs_the_numbers_of_the_weight_is_refused(make, images):
    model = make()
    kind = "GGUFLinear whose weight is a GGUFParameter" if "GGUF" in repr(model) else "Linear whose weight is a Codes"
    adapters = adapted(model)
    y = model(images)
    for refused in (adapters.merge, adapters.merge_and_unload):
        with pytest.raises(AdapterError, match=f"blocks.0.attn.qkv is a {kind}, into which nothing can be merged"):
            refused()
    with pytest.raises(AdapterError, match=r"can't have an adapter for each sample; .* none that is quantised"):
        with adapters.per_sample(["a", None, None]):
            pass
    for settings in (LoraSettings(4, 4.0, dora=True), LoraSettings(4, 4.0, pissa=True)):
        with pytest.raises(AdapterError, match=f"DoRA and PiSSA need a weight's numbers, and .*qkv is a {kind}"):
            adapters.add("b", find_targets(model, ["qkv"]), settings)
    dora = LowRankWeights(torch.zeros(4, 64), torch.zeros(192, 4), 4, 4.0, 192, magnitude=torch.ones(192))
    with pytest.raises(AdapterError, match="DoRA and PiSSA need a weight's numbers"):
        adapters.load("b", Adapter({"blocks.0.attn.qkv": dora}))
    assert torch.equal(model(images), y)


def test_quantised_module_is_not_trained_in_full(make, images):
    model = make()
    adapters = adapted(model)
    y = model(images)
    for step in (
        lambda: adapters.add("b", [TargetLayer("head")], SETTINGS, ["blocks.1.mlp"]),
        lambda: adapters.load("b", Adapter({}, {"blocks.1.mlp": {}})),
    ):
        with pytest.raises(AdapterError, match=r"blocks\.1\.mlp\.fc1\.weight is quantised, and .*mlp can't be trained"):
            step()
    assert torch.equal(model(images), y)


def test_adapter_of_another_width_is_refused(make):
    low = LowRankWeights(torch.zeros(4, 65), torch.zeros(192, 4), 4, 4.0, 192)
    with pytest.raises(AdapterError, match=r"lora_A has shape \[4, 65\], the model needs \[4, 64\]"):
        Adapters(make()).load("a", Adapter({"blocks.0.attn.qkv": low}))


class Scaled(nn.Linear):
    """A class with a forward of its own, and arguments of its own."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return super().forward(x) * factor


def test_class_with_a_forward_of_its_own_keeps_it():
    model = nn.Sequential(Scaled(6, 4))
    x = torch.randn(3, 6)
    plain = model[0](x, factor=3.0)
    adapters = Adapters(model)
    adapters.add("a", [TargetLayer("0")], SETTINGS)
    low = model[0].lora
    nn.init.normal_(low.lora_B)
    wanted = plain + 1.5 * x @ low.lora_A.t() @ low.lora_B.t()
    torch.testing.assert_close(model[0](x, factor=3.0), wanted)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied[0](x, factor=3.0), wanted)


def test_stand_in_refuses_what_torchao_refuses():
    with pytest.raises(NotImplementedError):
        Codes.of(torch.randn(4, 4)) + 1
