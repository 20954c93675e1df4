"""DoRA against PEFT on the same weights, and against its formula in float64."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vislora.lora import Adapters, LoraSettings, TargetLayer, frozen_weight, prove_alive
from vislora.lora.dora import DoraConv2d, DoraLinear, _norm
from vislora.lora.fused import dropout_mask
from vislora.lora.low_rank import row_norms

peft = pytest.importorskip("peft")

IN, OUT = 24, 36
Q_AND_V = ((0, 12), (24, 36))
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "conv without bias": lambda: nn.Conv2d(6, 10, (3, 1), padding=(1, 0), bias=False),
    "1x1 conv": lambda: nn.Conv2d(6, 10, 1),
}


def adapted(layer: nn.Module, rows=None, trained: bool = True, **settings) -> tuple[nn.Module, Adapters]:
    """The layer in a model with DoRA of rank 4 and alpha 6 on it, its B and magnitudes random."""
    model = nn.Sequential(layer)
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0", rows)], LoraSettings(4, 6.0, dora=True, **settings))
    if trained:
        with torch.no_grad():
            layer.lora.lora_B.normal_(std=0.3)
            layer.lora.magnitude.mul_(1 + 0.3 * torch.randn(layer.lora.magnitude.shape))
    return model, adapters


def input_of(layer: nn.Module) -> Tensor:
    return torch.randn(3, 6, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(3, 7, IN)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def in_peft(base: nn.Module, mine: nn.Module, **config) -> nn.Module:
    """PEFT's DoRA on a copy of the base layer, with the trained values of mine."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, **config)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    layer, low = model.base_model.model[0], mine[0].lora
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(low.lora_A)
        layer.lora_B["default"].weight.copy_(low.lora_B)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(low.magnitude.view(magnitude.shape))
    return model


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a step on a fixed random projection of the output."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    return y.detach(), x.grad


def step_of_mine(model: nn.Module, x: Tensor) -> list[Tensor]:
    low = model[0].lora
    return [*step(model, x), low.lora_A.grad, low.lora_B.grad, low.magnitude.grad]


def step_of_peft(model: nn.Module, x: Tensor) -> list[Tensor]:
    layer = model.base_model.model[0]
    parts = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    y, dx = step(model, x)
    a, b, magnitude = (part["default"].weight.grad for part in parts)
    return [y, dx, a, b, magnitude.flatten()]


# --- PEFT on the same weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_output_and_all_gradients_equal_pefts(layer, rslora):
    base = layer()
    model, _ = adapted(copy.deepcopy(base), rslora=rslora)
    theirs, x = in_peft(base, model, use_rslora=rslora), input_of(base)
    assert relative_error(model(x), base(x)) > 0.1
    for mine, its in zip(step_of_mine(model, x), step_of_peft(theirs, x), strict=True):
        assert relative_error(mine, its) < 1e-5


class Dropping(nn.Module):
    """Dropout with a given mask."""

    def __init__(self, mask: Tensor, factor: float) -> None:
        super().__init__()
        self.mask, self.factor = mask, factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask * self.factor


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_output_and_all_gradients_equal_pefts_under_the_same_dropout(layer):
    base = layer()
    model, _ = adapted(copy.deepcopy(base), dropout=0.4)
    theirs, x = in_peft(base, model, lora_dropout=0.4), input_of(base)
    torch.manual_seed(2)
    rows = x.reshape(-1, IN) if isinstance(base, nn.Linear) else x
    mask, factor = dropout_mask(rows, 0.4)
    theirs.base_model.model[0].lora_dropout["default"] = Dropping(mask.view_as(x), factor)
    torch.manual_seed(2)
    for mine, its in zip(step_of_mine(model, x), step_of_peft(theirs, x), strict=True):
        assert relative_error(mine, its) < 1e-5
    model.eval()
    assert relative_error(model(x), in_peft(base, model).eval()(x)) < 1e-5


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_magnitudes_start_as_pefts_and_change_nothing(layer):
    base = layer()
    model, _ = adapted(copy.deepcopy(base), trained=False)
    x = input_of(base)
    if isinstance(base, nn.Linear):
        assert torch.equal(model(x), base(x))
    assert torch.allclose(model(x), base(x), atol=1e-6)
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=4, target_modules=["0"], use_dora=True))
    start = theirs.base_model.model[0].lora_magnitude_vector["default"].weight.flatten()
    assert torch.allclose(model[0].lora.magnitude, start, rtol=1e-6)


# --- The formula ------------------------------------------------------------------------------------------------------


def formula(layer: nn.Linear, x: Tensor, leaves: list[Tensor], rows) -> Tensor:
    """y in float64, row range by row range; the norm a constant."""
    a, b, magnitude = leaves
    weight = frozen_weight(layer).detach().double()
    parts, offset = list(weight), 0
    for i, (start, stop) in enumerate(rows):
        for j in range(start, stop):
            row = weight[j] + 1.5 * b[offset] @ a[4 * i : 4 * i + 4]
            parts[j] = magnitude[offset] / row.detach().norm() * row
            offset += 1
    return F.linear(x, torch.stack(parts), layer.bias.detach().double())


@pytest.mark.parametrize("rows", [((0, OUT),), Q_AND_V, ((12, 24),)], ids=["all rows", "q and v", "k"])
def test_step_on_some_rows_equals_the_formula_in_float64(rows):
    layer = nn.Linear(IN, OUT)
    model, _ = adapted(layer, rows)
    low, x = layer.lora, torch.randn(5, IN)
    leaves = [p.detach().double().requires_grad_() for p in (low.lora_A, low.lora_B, low.magnitude)]
    x64 = x.double().requires_grad_()
    y = formula(layer, x64, leaves, rows)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [y.detach(), *torch.autograd.grad(y, [x64, *leaves], dy.double())]
    for mine, exact in zip(step_of_mine(model, x), wanted, strict=True):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_without_a_pair_stay_the_frozen_ones(dropout):
    layer = nn.Linear(IN, OUT)
    base, (model, _), x = copy.deepcopy(layer), adapted(layer, Q_AND_V, dropout=dropout), torch.randn(5, IN)
    difference = (model(x) - base(x)).abs().amax(0)
    assert difference[12:24].max() < 1e-6
    assert difference[:12].min() > 1e-4
    assert difference[24:].min() > 1e-4


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_norm_without_the_matrix_is_the_norm_of_the_matrix(layer):
    for rows in (None, ((0, 3), (5, 9))):
        model, _ = adapted(layer(), rows)
        low, weight = model[0].lora, frozen_weight(model[0])
        update = low.scale * low.wide_B(weight.shape[0]) @ low.lora_A.flatten(1)
        wanted = (weight + update.view(weight.shape)).flatten(1).norm(dim=1)
        assert torch.allclose(_norm(low, weight), wanted, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("rows", [None, ((2, 5),)], ids=["all rows", "some"])
def test_base_weights_loaded_later_count(layer, rows):
    base = layer()
    model, adapters = adapted(base, rows)
    with torch.no_grad():
        base._parameters["weight"].mul_(2.0).add_(0.1)
    fresh, theirs = layer(), adapters.adapter("it")
    fresh.load_state_dict({key: value for key, value in base.state_dict().items() if "lora" not in key})
    other = Adapters(nn.Sequential(fresh))
    norms = torch.linalg.vector_norm(fresh.weight.detach().flatten(1), dim=1)
    outside = torch.ones(len(norms), dtype=torch.bool)
    for start, stop in rows or ((0, len(norms)),):
        outside[start:stop] = False
    assert torch.allclose(theirs.layers["0"].magnitude[outside], norms[outside])
    other.load("it", theirs)
    x = input_of(base)
    assert relative_error(model(x), other.model(x)) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm", [False, True], ids=["", "behind a LayerNorm"])
def test_empty_batch_passes(dropout, norm):
    model, _ = adapted(nn.Linear(IN, OUT), dropout=dropout)
    model = nn.Sequential(nn.LayerNorm(IN), *model) if norm else model
    y = model.train()(torch.zeros(0, 3, IN))
    assert y.shape == (0, 3, OUT)
    y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_row_of_zeros_stays_zero_instead_of_nan(dropout):
    layer = nn.Linear(IN, OUT)
    nn.init.zeros_(frozen_weight(layer)[3])
    model, _ = adapted(layer, dropout=dropout, trained=False)
    for found in step_of_mine(model, torch.randn(5, IN)):
        assert found.isfinite().all()
    assert torch.allclose(model(torch.randn(5, IN))[:, 3], layer.bias[3])


def test_row_of_zeros_stays_zero_when_merged():
    layer = nn.Linear(IN, OUT)
    nn.init.zeros_(frozen_weight(layer)[3])
    _, adapters = adapted(layer, trained=False)
    adapters.merge()
    assert layer.weight.isfinite().all()
    assert not layer.weight[3].any()


def test_pair_that_takes_the_weight_away_leaves_finite_numbers():
    layer = nn.Conv2d(24, 64, 1, bias=False)
    model, _ = adapted(layer)
    with torch.no_grad():  # so that the squared norms are but rounding errors, of either sign
        frozen_weight(layer).copy_(
            (-1.5 * layer.lora.lora_B.flatten(1) @ layer.lora.lora_A.flatten(1))[..., None, None]
        )
    assert model(torch.randn(2, 24, 3, 3)).isfinite().all()


# --- Merge, strength, proof -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, ((0, 3), (5, 9))], ids=["all rows", "some rows"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_merged_layer_gives_the_adapted_output_and_unmerge_the_frozen_bits(layer, rows):
    model, adapters = adapted(layer(), rows)
    x, weight = input_of(model[0]), frozen_weight(model[0]).detach().clone()
    wanted = model(x)
    adapters.merge()
    assert type(model[0]) in (nn.Linear, nn.Conv2d)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    adapters.unmerge()
    assert torch.equal(frozen_weight(model[0]), weight)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_strength_goes_from_the_base_model_to_the_trained_adapter(layer):
    base = layer()
    model, adapters = adapted(copy.deepcopy(base))
    x = input_of(base)
    trained = model(x)
    adapters.scale("it", 0.0)
    assert torch.allclose(model(x), base(x), atol=1e-6)
    adapters.scale("it", 0.5)
    half = model(x)
    adapters.merge()
    assert torch.allclose(model(x), half, atol=1e-5)
    adapters.unmerge()
    adapters.scale("it", 1.0)
    assert torch.equal(model(x), trained)
    assert relative_error(half, trained) > 0.01
    assert relative_error(half, base(x)) > 0.01


def test_value_carries_the_magnitude_of_every_row_and_loads_to_the_same_output():
    base = nn.Linear(IN, OUT)
    model, adapters = adapted(copy.deepcopy(base), Q_AND_V)
    value = adapters.adapter("it")
    magnitude = value.layers["0"].magnitude
    assert torch.equal(magnitude[12:24], row_norms(base.weight.detach())[12:24])
    assert torch.equal(magnitude[24:], model[0].lora.magnitude[12:])
    adapters.scale("it", 0.5)  # how strongly it acts, and no part of what was trained
    assert adapters.adapter("it").equals(value)
    adapters.scale("it", 1.0)
    x = torch.randn(5, IN)
    for weights in (value.layers["0"], value.layers["0"].as_one_pair()):
        other = nn.Sequential(copy.deepcopy(base))
        Adapters(other).load("it", type(value)({"0": weights}))
        assert torch.allclose(other(x), model(x), atol=1e-6)


def test_classes_change_in_place_and_back():
    for layer, kind in ((nn.Linear(IN, OUT), DoraLinear), (nn.Conv2d(3, 4, 3), DoraConv2d)):
        plain = type(layer)
        _, adapters = adapted(layer)
        assert type(layer) is kind
        adapters.remove("it")
        assert type(layer) is plain


def test_liveness_proof_takes_dora():
    model, _ = adapted(nn.Linear(IN, OUT), trained=False)
    prove_alive(model, lambda: model(torch.randn(2, IN)))


# --- Precision --------------------------------------------------------------------------------------------------------


def test_half_precision_weights_are_combined_in_float32_and_rounded_once():
    layer = nn.Linear(256, 64, bias=False).to(torch.bfloat16)
    model, adapters = adapted(layer)
    x = torch.randn(40, 256).to(torch.bfloat16)
    y = model(x)
    adapters.merge()
    assert y.dtype is torch.bfloat16
    assert relative_error(model(x), y) < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_step_is_close_to_the_float32_one(dropout):
    model, _ = adapted(nn.Linear(IN, OUT), Q_AND_V, dropout=dropout)
    x = torch.randn(64, IN)
    torch.manual_seed(3)
    wanted = step_of_mine(model, x)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = step_of_mine(model, x)
    assert found[0].dtype is torch.bfloat16
    for mine, exact in zip(found, wanted, strict=True):
        assert relative_error(mine, exact) < 0.02


def test_gradients_behind_a_float32_norm_of_a_bfloat16_model_are_near_those_in_float64():
    torch.manual_seed(1)
    x = 30 + torch.randn(200, IN).bfloat16()
    model = nn.Sequential(nn.LayerNorm(IN), *adapted(nn.Linear(IN, OUT))[0])
    low, found = model[1].lora, []
    for dtype in (torch.float64, torch.bfloat16):
        model[1].to(dtype)
        low.to(torch.promote_types(dtype, torch.float32))
        model[0].to(low.lora_A.dtype)
        model.zero_grad()
        model(x.to(dtype)).double().square().sum().backward()
        found.append([low.lora_A.grad.clone(), low.lora_B.grad.clone(), low.magnitude.grad.clone()])
    for exact, mine in zip(*found, strict=True):
        assert relative_error(mine, exact) < 0.03


def test_gradients_behind_a_norm_under_autocast_are_near_those_in_float64():
    torch.manual_seed(1)
    x = 30 + torch.randn(200, IN)
    model = nn.Sequential(nn.LayerNorm(IN), *adapted(nn.Linear(IN, OUT))[0])
    low, found = model[1].lora, []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = model(x.to(dtype))
        y.double().square().sum().backward()
        found.append([low.lora_A.grad.clone(), low.lora_B.grad.clone(), low.magnitude.grad.clone()])
    for exact, mine in zip(*found, strict=True):
        assert relative_error(mine, exact) < 0.03


# --- Inside PyTorch's own machinery -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm residual MLP with DoRA on both layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(IN), nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        settings = LoraSettings(4, 6.0, dropout, dora=True)
        Adapters(self).add("it", [TargetLayer("fc1"), TargetLayer("fc2")], settings)
        nn.init.normal_(self.fc1.lora.lora_B, std=0.3)
        nn.init.normal_(self.fc2.lora.lora_B, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def gradients(model: nn.Module, run, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    run(x).square().sum().backward()
    return {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_block_gives_the_same_gradients(dropout):
    block, x = Block(dropout), torch.randn(2, 5, IN)
    wanted = gradients(block, block, x)
    assert {n.rpartition(".")[2] for n in wanted} == {"x", "lora_A", "lora_B", "magnitude"}
    found = gradients(block, lambda x: checkpoint(block, x, use_reentrant=False), x)
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < 1e-6, name


def test_compiled_block_is_one_graph_with_the_same_gradients():
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 5, IN)
    wanted = gradients(block, block, x)
    found = gradients(block, torch.compile(block, backend="aot_eager", fullgraph=True), x)
    for name in wanted:
        assert relative_error(found[name], wanted[name]) < 1e-5, name


@pytest.mark.parametrize("around", ["alone", "after a LayerNorm", "under autocast", "offloaded", "checkpointed"])
def test_output_may_be_changed_in_place_as_the_plain_layers_may(around):
    model, _ = adapted(nn.Linear(IN, OUT))
    low, x = model[0].lora, torch.randn(3, 40, IN)
    found = []
    for inplace in (False, True):
        start = x.clone().requires_grad_()
        relu = nn.LeakyReLU(0.5, inplace=inplace)  # whose gradient is nowhere 0, and so asks what all of y was
        chain = nn.Sequential(nn.LayerNorm(IN) if around == "after a LayerNorm" else nn.Identity(), *model, relu)
        chain.zero_grad()
        offload = torch.autograd.graph.save_on_cpu() if around == "offloaded" else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "under autocast"), offload:
            y = checkpoint(chain, start, use_reentrant=False) if around == "checkpointed" else chain(start)
        y.float().square().sum().backward()
        found.append([start.grad, low.lora_A.grad.clone(), low.lora_B.grad.clone(), low.magnitude.grad.clone()])
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) < 1e-6
