"""prove_alive names every adapted layer that can't move the output, and raises no false alarm."""

from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer, prove_alive

SETTINGS = LoraSettings(rank=2, alpha=4.0)
DIM = 12
Q, K, V = (0, DIM), (DIM, 2 * DIM), (2 * DIM, 3 * DIM)


class TinyAttention(nn.Module):
    """One head; subclasses break it in the ways real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.spare = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return self.o(self.mix(q, k, v))

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


class WeightDetached(TinyAttention):
    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight.detach(), self.qkv.bias)


class OutputUnused(TinyAttention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k, v) + 0 * self.spare(v)


class KeysDetached(TinyAttention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k.detach(), v)


class KeysUnused(TinyAttention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, q, v)


def adapt(model: nn.Module, *targets: TargetLayer) -> nn.Module:
    Adapters(model).add("it", targets, SETTINGS)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))


def vit(**how) -> nn.Module:
    size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size, **how)


def vit_targets() -> list[TargetLayer]:
    per_block = [
        ("attn.qkv", ((0, 48), (48, 96), (96, 144))),
        ("attn.proj", None),
        ("mlp.fc1", None),
        ("mlp.fc2", None),
    ]
    return [TargetLayer(f"blocks.{i}.{name}", rows) for i in range(2) for name, rows in per_block]


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


def blocked_vit(blocked: str) -> nn.Module:
    """A fresh ViT whose zeros, if any, let no gradient through to the adapters."""
    model = vit(init_values=1.0)
    names = {"nothing": (), "LayerScale": ("gamma",), "head": ("head",), "both": ("gamma", "head")}[blocked]
    zeros = [p for n, p in model.named_parameters() if names and any(name in n for name in names)]
    assert bool(zeros) == (blocked != "nothing")
    for parameter in zeros:
        nn.init.zeros_(parameter)
    Adapters(model).add("it", vit_targets(), SETTINGS, ["head"])
    return model


@pytest.mark.parametrize("blocked", ["nothing", "LayerScale", "head", "both"])
def test_fresh_vit_is_alive_and_the_proof_changes_nothing_in_it(blocked):
    model = blocked_vit(blocked).train()
    model.blocks[0].eval()
    before, modes = bits(model), [m.training for m in model.modules()]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prove_alive(model, lambda: model(images))
    assert bits(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "blocked",
    [
        "nothing",
        "head",
    ],
)
def test_proof_leaves_the_random_state_alone(blocked):
    model = blocked_vit(blocked)
    images = torch.randn(2, 3, 32, 32)
    before = torch.random.get_rng_state()
    prove_alive(model, lambda: model(images))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_proof_is_made_in_eval_mode(tokens):
    model = adapt(TinyAttention(), TargetLayer("qkv")).train()
    modes = []
    model.register_forward_hook(lambda module, args, output: modes.append(module.training))
    prove_alive(model, lambda: model(tokens))
    assert modes == [False]


def test_tiny_attention_is_alive(tokens):
    model = adapt(TinyAttention(), TargetLayer("qkv", (Q, K, V)), TargetLayer("o"))
    prove_alive(model, lambda: model(tokens))


def test_trained_adapter_is_alive(tokens):
    model = adapt(TinyAttention(), TargetLayer("qkv", (Q, K, V)))
    nn.init.normal_(model.qkv.lora.lora_B)
    prove_alive(model, lambda: model(tokens))


def test_layer_whose_weight_is_read_without_its_gradient_is_named(tokens):
    model = adapt(WeightDetached(), TargetLayer("qkv"), TargetLayer("o"))
    with pytest.raises(AdapterError, match=r"1 of 2 adapted layers can't move the output: qkv;"):
        prove_alive(model, lambda: model(tokens))


def test_model_in_which_no_adapter_acts_at_all_names_them(tokens):
    model = adapt(WeightDetached(), TargetLayer("qkv"), TargetLayer("spare"))
    with pytest.raises(AdapterError, match=r"2 of 2 .*: qkv, spare;"):
        prove_alive(model, lambda: model(tokens))


@pytest.mark.parametrize("cls", [TinyAttention, OutputUnused], ids=["never called", "called and multiplied by zero"])
def test_layer_whose_output_is_unused_is_named(tokens, cls):
    model = adapt(cls(), TargetLayer("qkv"), TargetLayer("spare"))
    with pytest.raises(AdapterError, match=r"1 of 2 .*: spare;"):
        prove_alive(model, lambda: model(tokens))


@pytest.mark.parametrize("cls", [KeysDetached, KeysUnused])
def test_layer_with_one_cut_pair_is_named_though_the_others_act(tokens, cls):
    model = adapt(cls(), TargetLayer("qkv", (Q, K, V)), TargetLayer("o"))
    with pytest.raises(AdapterError, match=r"1 of 2 .*: qkv \(rows 12-23\);"):
        prove_alive(model, lambda: model(tokens))
    without_k = adapt(cls(), TargetLayer("qkv", (Q, V)), TargetLayer("o"))
    prove_alive(without_k, lambda: without_k(tokens))


def test_failed_proof_restores_modes_and_parameters(tokens):
    model = adapt(WeightDetached(), TargetLayer("qkv"))
    nn.init.zeros_(model.o.weight)
    model.train()
    before = bits(model)
    with pytest.raises(AdapterError):
        prove_alive(model, lambda: model(tokens))
    assert bits(model) == before
    assert model.training


def test_forward_that_raises_leaves_the_model_in_its_mode():
    model = adapt(TinyAttention(), TargetLayer("qkv")).train()
    with pytest.raises(ZeroDivisionError):
        prove_alive(model, lambda: 1 / 0)
    assert model.training


def test_model_without_an_active_adapter_is_refused_or_passes(tokens):
    model = TinyAttention()
    try:
        prove_alive(model, lambda: model(tokens))
    except AdapterError as error:
        assert "adapter" in str(error)  # noqa: PT017


class KeptBias(TinyAttention):
    """A bias that is computed from a parameter once, and kept in eval mode; its projection starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.kept = nn.Parameter(torch.zeros(DIM)), None

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.gate * 2
        return super().forward(x) * self.kept


def test_what_a_model_keeps_in_eval_mode_is_not_left_from_the_proof(tokens):
    model = adapt(KeptBias(), TargetLayer("qkv", (Q, K, V))).eval()
    before = model(tokens)
    prove_alive(model, lambda: model(tokens))
    assert torch.equal(model(tokens), before)
    assert not model.training


def test_fresh_batchnorm_model_whose_activations_vanish_is_alive_and_keeps_its_statistics():
    torch.manual_seed(0)
    model = timm.create_model("levit_conv_128s", num_classes=2)
    layers = [(n, m) for n, m in model.named_modules() if n.startswith("stages.2.") and n.endswith("qkv.linear")]
    Adapters(model).add("it", [TargetLayer(name, ((0, 16), (32, 64))) for name, _ in layers], SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    prove_alive(model, lambda: model(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gamma", [1e-6, 1e-5])
def test_small_layer_scale_that_float16_rounds_to_nothing_is_no_false_alarm(gamma):
    model = vit(init_values=gamma).half()
    Adapters(model).add("it", vit_targets(), SETTINGS)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    prove_alive(model, lambda: model(images))


@dataclass
class Answer:
    note: str
    logits: Tensor
    features: Tensor | None = None


@pytest.mark.parametrize(
    "output",
    [
        lambda y: (y, y.detach()),
        lambda y: {"tokens": [y], "count": 3},
        lambda y: Answer("", y),
        lambda y: (torch.arange(3), Answer("", y.detach(), y)),
    ],
    ids=["tuple", "dict of a list", "dataclass", "nested"],
)
def test_outputs_of_other_kinds(tokens, output):
    model = adapt(TinyAttention(), TargetLayer("qkv", (Q, K, V)))
    prove_alive(model, lambda: output(model(tokens)))
    dead = adapt(TinyAttention(), TargetLayer("qkv"), TargetLayer("spare"))
    with pytest.raises(AdapterError, match=r"1 of 2 .*: spare;"):
        prove_alive(dead, lambda: output(dead(tokens)))


@pytest.mark.parametrize("output", [lambda y: None, lambda y: y.detach(), lambda y: "text"])
def test_output_without_a_gradient_leaves_all_dead(tokens, output):
    model = adapt(TinyAttention(), TargetLayer("qkv"))
    with pytest.raises(AdapterError, match=r"1 of 1 .*: qkv;"):
        prove_alive(model, lambda: output(model(tokens)))


def test_adapter_at_scale_zero_and_inference_mode_are_told_apart_from_dead_layers():
    model = TinyAttention()
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("qkv")], SETTINGS)
    x = torch.randn(2, 4, DIM)
    with torch.inference_mode(), pytest.raises(AdapterError, match=r"torch\.inference_mode has none; prove it outside"):
        prove_alive(model, lambda: model(x))
    prove_alive(model, lambda: model(x))
    adapters.scale("it", 0.0)
    with pytest.raises(AdapterError, match="the adapter is at scale 0, where it changes nothing"):
        prove_alive(model, lambda: model(x))
