"""An adapter acts as well where a model reads a layer's weight and never calls the layer."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, LowRank, TargetLayer, frozen_weight

DIM = 24
Q, V = (0, DIM), (2 * DIM, 3 * DIM)


def tiny(name: str, **how) -> nn.Module:
    """With LayerScales and norms of 1, some of which start near zero, so that its blocks matter."""
    model = timm.create_model(name, img_size=32, num_classes=5, embed_dim=DIM, **how)
    for parameter_name, parameter in model.named_parameters():
        if "gamma" in parameter_name or parameter_name.endswith("norm1.weight"):
            nn.init.ones_(parameter)
    return model


def transformer(name: str, **how) -> nn.Module:
    return tiny(name, depth=2, num_heads=2, **how)


def swin_v2() -> nn.Module:
    return tiny("swinv2_tiny_window8_256", window_size=4, depths=(2,), num_heads=(2,))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)


def clip_pool() -> nn.Module:
    pool = pytest.importorskip("open_clip.modified_resnet").AttentionPool2d(4, DIM, 2)
    return nn.Sequential(pool)


IMAGES = (2, 3, 32, 32)
TOKENS = (2, 5, DIM)
# how the model is made, the shape of its input, the layers it reads with the rows of their pairs
READERS: dict[str, tuple[Callable[[], nn.Module], tuple, dict]] = {
    "BEiT": (
        lambda: transformer("beit_base_patch16_224"),
        IMAGES,
        {"blocks.0.attn.qkv": None, "blocks.1.attn.qkv": (Q, V)},
    ),
    "EVA-02": (
        lambda: transformer("eva02_tiny_patch14_224", qkv_fused=True, patch_size=16),
        IMAGES,
        {"blocks.0.attn.qkv": (Q, V), "blocks.0.attn.proj": None},
    ),
    "SwinV2": (swin_v2, IMAGES, {"layers.0.blocks.0.attn.qkv": (Q, V), "layers.0.blocks.1.attn.qkv": None}),
    "torch attention": (TorchAttention, TOKENS, {"attn": (Q, V), "attn.out_proj": None}),
    "torch encoder": (encoder_layer, TOKENS, {"self_attn": None, "self_attn.out_proj": None, "linear1": None}),
    "CLIP pool": (clip_pool, (2, DIM, 4, 4), {f"0.{part}_proj": None for part in "qkvc"}),
}


@pytest.fixture(params=READERS.values(), ids=READERS.keys())
def reader(request):
    """An adapted model, its adapters, a copy of the plain model, and an input."""
    torch.manual_seed(0)
    make, shape, layers = request.param
    model = make()
    plain = copy.deepcopy(model)
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer(name, rows) for name, rows in layers.items()], LoraSettings(3, 6.0))
    return model, adapters, plain, torch.randn(shape)


def train_a_little(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.lora_B, std=0.3)


def updates(model: nn.Module) -> dict[str, LowRank]:
    return {name.removesuffix(".lora"): module for name, module in model.named_modules() if isinstance(module, LowRank)}


def by_hand(plain: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model in float64, trainable, its weights replaced by W0 + s B A, pair by pair."""
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for name, low in updates(model).items():
            weight = frozen_weight(exact.get_submodule(name))
            a, b = low.lora_A.double(), low.lora_B.double().split([stop - start for start, stop in low.rows])
            for i, (start, stop) in enumerate(low.rows):
                weight[start:stop] += 6.0 / 3 * b[i] @ a[i * 3 : (i + 1) * 3]
    return exact


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return ((found - wanted).norm() / wanted.norm()).item() < tolerance


def test_untrained_adapter_changes_nothing(reader):
    model, _, plain, x = reader
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_is_that_of_the_replaced_weights(reader, training):
    model, _, plain, x = reader
    train_a_little(model)
    exact = by_hand(plain, model).train(training)(x.double())
    assert not close(plain.train(training)(x), exact, 1e-3)
    assert close(model.train(training)(x), exact)


def test_output_without_gradient_is_the_same(reader):
    model, _, plain, x = reader
    train_a_little(model)
    exact = by_hand(plain, model).eval()(x.double())
    with torch.no_grad():
        assert close(model.eval()(x), exact)
    with torch.inference_mode():
        assert close(model(x), exact)


def test_gradients_are_those_through_the_replaced_weights(reader):
    model, _, plain, x = reader
    train_a_little(model)
    exact = by_hand(plain, model)
    dy = torch.randn_like(model(x))
    model(x).backward(dy)
    exact.requires_grad_(True)(x.double()).backward(dy.double())
    for name, low in updates(model).items():
        dw = frozen_weight(exact.get_submodule(name)).grad
        offset = 0
        for i, (start, stop) in enumerate(low.rows):
            a, b = slice(i * 3, (i + 1) * 3), slice(offset, offset + stop - start)
            offset = b.stop
            assert close(low.lora_A.grad[a], 2.0 * low.lora_B[b].double().t() @ dw[start:stop], 1e-4)
            assert close(low.lora_B.grad[b], 2.0 * dw[start:stop] @ low.lora_A[a].double().t(), 1e-4)
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora." not in name)


def test_merged_model_gives_the_adapted_output_and_unmerge_restores_every_bit(reader):
    model, adapters, _, x = reader
    train_a_little(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = model.eval()(x)
    adapters.merge()
    assert close(model(x), adapted.double())
    adapters.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), adapted)


def test_removed_adapter_leaves_the_model_as_it_was(reader):
    model, adapters, plain, x = reader
    train_a_little(model)
    adapters.remove("it")
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_copies_and_state_dicts_hold_the_frozen_weight(reader):
    model, _, plain, x = reader
    train_a_little(model)
    names = {name for name in model.state_dict() if ".lora." not in name}
    assert names == plain.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    for low in updates(twin).values():
        nn.init.zeros_(low.lora_B)
    assert torch.allclose(twin(x), plain.eval()(x), atol=1e-6)
    assert close(twin.double()(x.double()), plain.double()(x.double()))


def test_torch_attention_makes_the_sum_once_per_pass(monkeypatch):
    model = TorchAttention()
    Adapters(model).add("it", [TargetLayer("attn"), TargetLayer("attn.out_proj")], LoraSettings(3, 6.0))
    made, merged = [], LowRank.merged
    monkeypatch.setattr(LowRank, "merged", lambda low, weight: made.append(low) or merged(low, weight))
    for training in (True, False):
        made.clear()
        model.train(training)(torch.randn(TOKENS))
        assert sorted(map(id, made)) == sorted(map(id, updates(model).values()))


def test_read_linear_is_its_own_fused_step(monkeypatch):
    """No sum is made: bf16 has no room for a small update in W0 + s B A, and its gradient costs a full product."""
    layer = nn.Sequential(nn.Linear(DIM, DIM, bias=False))
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    monkeypatch.delattr(LowRank, "merged")
    nn.init.normal_(layer[0].lora.lora_B, std=1e-4)
    x, bias = torch.randn(4, DIM), torch.randn(DIM)
    assert torch.equal(F.linear(x, layer[0].weight), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        read, called = F.linear(x, layer[0].weight, bias), layer(x)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, called + bias.bfloat16())


def test_bias_that_is_trained_beside_a_read_weight_gets_its_gradient():
    layer = nn.Sequential(nn.Linear(DIM, DIM, bias=False))
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    bias = torch.zeros(DIM, requires_grad=True)
    F.linear(torch.randn(4, DIM), weight=layer[0].weight, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((DIM,), 4.0))


@pytest.mark.parametrize("bias", [None, torch.ones(DIM)], ids=["none", "another"])
def test_a_layers_own_bias_stays_out_where_its_weight_is_read_with_another_or_none(bias):
    layer = nn.Sequential(nn.Linear(DIM, DIM))
    plain = copy.deepcopy(layer)
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    train_a_little(layer)
    x, exact = torch.randn(4, DIM), by_hand(plain, layer)[0].weight
    wanted = F.linear(x.double(), exact, None if bias is None else bias.double())
    assert close(F.linear(x, layer[0].weight, bias), wanted)


def test_half_precision_sum_is_rounded_once():
    attention = TorchAttention().bfloat16()
    Adapters(attention).add("it", [TargetLayer("attn")], LoraSettings(3, 6.0))
    train_a_little(attention)
    low = attention.attn.lora
    exact = frozen_weight(attention.attn).float() + 2.0 * low.lora_B @ low.lora_A
    read = attention.attn.in_proj_weight * 1
    assert read.dtype == torch.bfloat16
    assert (read != exact.bfloat16()).double().mean() < 1e-2


def test_sum_is_made_in_float32_under_autocast():
    attention = TorchAttention()
    Adapters(attention).add("it", [TargetLayer("attn")], LoraSettings(3, 6.0))
    train_a_little(attention)
    low = attention.attn.lora
    exact = frozen_weight(attention.attn).double() + 2.0 * low.lora_B.double() @ low.lora_A.double()
    with torch.autocast("cpu", torch.bfloat16):
        read = attention.attn.in_proj_weight * 1
    assert (read - exact).abs().max() < 1e-6


def test_what_is_known_of_a_weight_without_its_values_is_the_frozen_ones():
    layer = nn.Sequential(nn.Linear(DIM, 2 * DIM))
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    weight = layer[0].weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((2 * DIM, DIM), torch.float32, "cpu")
    assert (weight.size(0), weight.dim(), weight.numel()) == (2 * DIM, 2, 2 * DIM * DIM)


def test_a_read_weight_is_the_sum_in_any_expression():
    layer = nn.Sequential(nn.Linear(DIM, DIM))
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    train_a_little(layer)
    low, weight = layer[0].lora, layer[0].weight
    wanted = frozen_weight(layer[0]) + 2.0 * low.lora_B @ low.lora_A
    for read, exact in (
        (weight[1:3], wanted[1:3]),
        (weight + 1.0, wanted + 1.0),
        (1.0 - weight, 1.0 - wanted),
        (weight**2, wanted**2),
        (weight.t() @ weight, wanted.t() @ wanted),
        (torch.cat([weight, weight]), torch.cat([wanted, wanted])),
    ):
        torch.testing.assert_close(read, exact)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.zero_(),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: torch.mul(torch.ones(DIM, DIM), 2.0, out=layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(DIM, DIM)),
    ],
    ids=["zero_", "init", "setitem", "data read", "out", "data set"],
)
def test_writing_to_a_computed_weight_is_refused(write):
    layer = nn.Sequential(nn.Linear(DIM, DIM))
    adapters = Adapters(layer)
    adapters.add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
    with torch.no_grad(), pytest.raises(AdapterError, match="weight of an adapted layer"):
        write(layer[0])
    adapters.deactivate()
    with torch.no_grad():
        write(layer[0])


def test_dropout_acts_on_a_read_linear():
    torch.manual_seed(0)
    model = transformer("beit_base_patch16_224")
    Adapters(model).add("it", [TargetLayer("blocks.0.attn.qkv")], LoraSettings(3, 6.0, dropout=0.5))
    train_a_little(model)
    x = torch.randn(IMAGES)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["attn", "attn.out_proj"])
def test_dropout_that_cannot_act_is_refused(name):
    with pytest.raises(AdapterError, match=rf"dropout=0.1 can't act on {name}: .* set it to 0"):
        Adapters(TorchAttention()).add("it", [TargetLayer(name)], LoraSettings(3, 6.0, dropout=0.1))


def test_dropout_is_refused_in_training_where_a_weight_is_read_for_anything_but_its_product():
    layer = nn.Sequential(nn.Linear(DIM, DIM))
    Adapters(layer).add("it", [TargetLayer("0")], LoraSettings(3, 6.0, dropout=0.1))
    with pytest.raises(AdapterError, match=r"dropout=0\.1 can't act on a LoraLinear whose weight is read as a whole"):
        layer[0].weight.t() * 1
    layer.eval()
    assert torch.equal(layer[0].weight.t() * 1, frozen_weight(layer[0]).t())


def test_torch_attention_with_keys_of_another_width_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(DIM, 2, kdim=8, vdim=8))
    with pytest.raises(AdapterError, match="separate weights for q, k and v"):
        Adapters(model).add("it", [TargetLayer("0")], LoraSettings(3, 6.0))
