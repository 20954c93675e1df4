"""The fused LoRA step against float64 autograd of the formula, finite differences and PEFT."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraConv2d, LoraLinear, LoraSettings, TargetLayer, frozen_weight

IN, OUT = 24, 36


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, params=["fused", "summed", "added"])
def step(request, monkeypatch) -> str:
    """Every test runs with every kind of step, whichever is the fastest for a layer's and an input's size."""
    narrow, short = request.param == "summed", request.param == "added"
    monkeypatch.setattr("vislora.lora.layers.is_narrow", lambda weight, *_: narrow and weight.dtype.itemsize >= 4)
    monkeypatch.setattr("vislora.lora.layers.is_short", lambda x, _: short)
    return request.param


def adapted(layer: nn.Module, rank: int = 4, alpha: float = 6.0, rows=None, rslora=False, dropout=0.0) -> nn.Module:
    """The layer with a random, non-zero adapter on it."""
    model = nn.Sequential(layer)
    Adapters(model).add("it", [TargetLayer("0", rows)], LoraSettings(rank, alpha, dropout, rslora))
    nn.init.normal_(layer.lora.lora_B, std=0.3)
    return layer


def pair_rows(layer: nn.Module, rows) -> list[tuple[int, int]]:
    return [(0, frozen_weight(layer).shape[0])] if rows is None else list(rows)


def reference_weight(weight: Tensor, a: Tensor, b: Tensor, rows, rank: int, scale: float) -> Tensor:
    """W0 + s B A pair by pair, written out as the papers do."""
    update, offset = torch.zeros_like(weight).flatten(1), 0
    for i, (start, stop) in enumerate(rows):
        pair_a = a[i * rank : (i + 1) * rank].flatten(1)
        pair_b = b[offset : offset + stop - start].flatten(1)
        update = update + F.pad(scale * pair_b @ pair_a, (0, 0, start, weight.shape[0] - stop))
        offset += stop - start
    return weight + update.view_as(weight)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def fused_step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, layer.lora.lora_A.grad, layer.lora.lora_B.grad]


def reference_step(layer: nn.Module, x: Tensor, dy: Tensor, rows, scale: float) -> list[Tensor]:
    """The same step by autograd of the formula in float64."""
    x, a, b = leaf(x), leaf(layer.lora.lora_A), leaf(layer.lora.lora_B)
    rank = layer.lora.lora_B.shape[1]
    weight = reference_weight(frozen_weight(layer).detach().double(), a, b, pair_rows(layer, rows), rank, scale)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Conv2d):
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    else:
        y = F.linear(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], dy.double())]


QKV_ROWS = {
    "all rows": None,
    "q and v of a qkv": ((0, 12), (24, 36)),
    "q, k and v of a qkv": ((0, 12), (12, 24), (24, 36)),
    "k only": ((12, 24),),
}
# with many tokens the update reaches the gradient of x through the weight, with few it is added to it
SHAPES = {
    "many tokens": (4, 32, IN),
    "2-D": (7, IN),
    "3-D": (2, 5, IN),
    "4-D": (2, 3, 4, IN),
    "one token": (1, 1, IN),
    "1-D": (IN,),
}


@pytest.mark.parametrize("rows", QKV_ROWS.values(), ids=QKV_ROWS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear_step_equals_the_formula_in_float64(shape, rows):
    layer = adapted(nn.Linear(IN, OUT), rank=4, alpha=6.0, rows=rows)
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], OUT)
    for found, wanted in zip(fused_step(layer, x, dy), reference_step(layer, x, dy, rows, 6.0 / 4), strict=True):
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("rows", QKV_ROWS.values(), ids=QKV_ROWS.keys())
def test_output_without_gradients_equals_the_formula_in_float64(rows):
    layer, x = adapted(nn.Linear(IN, OUT), rank=4, alpha=6.0, rows=rows), torch.randn(4, 32, IN)
    wanted, *_ = reference_step(layer, x, torch.ones(4, 32, OUT), rows, 6.0 / 4)
    with torch.no_grad():
        assert relative_error(layer(x), wanted) < 1e-5


@pytest.mark.parametrize("rows", QKV_ROWS.values(), ids=QKV_ROWS.keys())
def test_linear_step_without_bias_equals_the_formula_in_float64(rows):
    layer = adapted(nn.Linear(IN, OUT, bias=False), rank=4, alpha=6.0, rows=rows)
    x, dy = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    for found, wanted in zip(fused_step(layer, x, dy), reference_step(layer, x, dy, rows, 6.0 / 4), strict=True):
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [
        (4, 7.0, False, 7 / 4),
        (3, 1.0, False, 1 / 3),
        (8, 0.5, False, 0.5 / 8),
        (5, 3.0, True, 3 / math.sqrt(5)),
        (1, 16.0, True, 16.0),
        (6, 2.5, True, 2.5 / math.sqrt(6)),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scale_is_alpha_over_rank_and_over_its_root_for_rslora(kind, rank, alpha, rslora, scale):
    if kind == "linear":
        layer, x, dy = nn.Linear(IN, OUT), torch.randn(5, IN), torch.randn(5, OUT)
    else:
        layer, x, dy = nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5), torch.randn(2, 6, 3, 3)
    adapted(layer, rank, alpha, rslora=rslora)
    for found, wanted in zip(fused_step(layer, x, dy), reference_step(layer, x, dy, None, scale), strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_linear_step_is_right_for_non_contiguous_inputs_and_gradients():
    rows = QKV_ROWS["q and v of a qkv"]
    layer = adapted(nn.Linear(IN, OUT), rows=rows)
    x, dy = torch.randn(5, IN, 2).transpose(1, 2), torch.randn(OUT, 2, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    for found, wanted in zip(fused_step(layer, x, dy), reference_step(layer, x, dy, rows, 1.5), strict=True):
        assert relative_error(found, wanted) < 1e-5
    expanded = torch.ones(()).expand(5, 2, OUT)
    for found, wanted in zip(
        fused_step(layer, x, expanded), reference_step(layer, x, expanded, rows, 1.5), strict=True
    ):
        assert relative_error(found, wanted) < 1e-5


def test_input_that_needs_no_gradient_gets_none_and_the_pair_still_does():
    layer = adapted(nn.Linear(IN, OUT))
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    _, _, da, db = reference_step(layer, x, dy, None, 1.5)
    layer(x).backward(dy)
    assert x.grad is None
    assert relative_error(layer.lora.lora_A.grad, da) < 1e-5
    assert relative_error(layer.lora.lora_B.grad, db) < 1e-5


def test_frozen_weight_and_bias_get_no_gradient():
    for layer, x in [(nn.Linear(IN, OUT), torch.randn(5, IN)), (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5))]:
        adapted(layer)(x.requires_grad_()).sum().backward()
        assert frozen_weight(layer).grad is None
        assert layer.bias.grad is None


def test_gradients_accumulate_over_two_uses_of_one_layer():
    layer = adapted(nn.Linear(IN, IN))
    x, dy = torch.randn(5, IN), torch.randn(5, IN)
    a, b = leaf(layer.lora.lora_A), leaf(layer.lora.lora_B)
    weight = reference_weight(frozen_weight(layer).detach().double(), a, b, [(0, IN)], 4, 1.5)
    bias = layer.bias.detach().double()
    y = F.linear(F.linear(x.double(), weight, bias), weight, bias)
    wanted = torch.autograd.grad(y, [a, b], dy.double())
    layer(layer(x)).backward(dy)
    assert relative_error(layer.lora.lora_A.grad, wanted[0]) < 1e-5
    assert relative_error(layer.lora.lora_B.grad, wanted[1]) < 1e-5


@pytest.mark.parametrize("rows", QKV_ROWS.values(), ids=QKV_ROWS.keys())
@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_gradients_pass_finite_differences(bias, tokens, rows):
    rows = rows and tuple((start // 6, stop // 6) for start, stop in rows)
    layer = adapted(nn.Linear(4, OUT // 6, bias=bias).double(), rank=2, alpha=3.0, rows=rows)
    layer.lora.double()
    x = torch.randn(2, tokens, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora.lora_A, layer.lora.lora_B), fast_mode=True)


# --- Conv2d -----------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "3x3 stride 2 padding 1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2x3 uneven": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1)},
    "patch": {"kernel_size": 4, "stride": 4},
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("rows", "bias"), [(None, True), (((0, 4), (8, 12)), False)], ids=["all rows", "two pairs, no bias"]
)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_conv_step_equals_the_formula_in_float64(geometry, rows, bias, memory_format):
    layer = adapted(nn.Conv2d(6, 12, bias=bias, **geometry), rank=3, alpha=4.0, rows=rows)
    assert type(layer) is LoraConv2d
    x = torch.randn(2, 6, 8, 8).to(memory_format=memory_format)
    with torch.no_grad():
        dy = torch.randn_like(layer(x))
    wanted = reference_step(layer, x, dy, rows, 4 / 3)
    for found, exact in zip(fused_step(layer, x, dy), wanted, strict=True):
        assert relative_error(found, exact) < 1e-5
    with torch.no_grad():
        assert relative_error(layer(x), wanted[0]) < 1e-5


@pytest.mark.parametrize("rows", [None, ((0, 2), (4, 6))], ids=["all rows", "two pairs"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_conv_gradients_pass_finite_differences(geometry, rows):
    layer = adapted(nn.Conv2d(2, 6, **geometry).double(), rank=2, alpha=3.0, rows=rows)
    layer.lora.double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora.lora_A, layer.lora.lora_B), fast_mode=True)


def test_conv_input_that_needs_no_gradient_gets_none_and_the_pair_still_does():
    layer = adapted(nn.Conv2d(3, 6, 3))
    x, dy = torch.randn(2, 3, 5, 5), torch.randn(2, 6, 3, 3)
    _, _, da, db = reference_step(layer, x, dy, None, 1.5)
    layer(x).backward(dy)
    assert x.grad is None
    assert relative_error(layer.lora.lora_A.grad, da) < 1e-5
    assert relative_error(layer.lora.lora_B.grad, db) < 1e-5


# --- Shapes the plain layer takes -------------------------------------------------------------------------------------


def test_linear_takes_an_empty_batch_as_the_plain_layer_does():
    layer = adapted(nn.Linear(IN, OUT))
    y = layer(torch.zeros(0, 3, IN))
    assert y.shape == (0, 3, OUT)
    y.sum().backward()
    assert not layer.lora.lora_A.grad.any()


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 6), lambda: nn.Conv2d(5, 6, 1)], ids=["linear", "conv"])
def test_input_of_another_dtype_than_the_weight_is_refused_as_the_plain_layer_does(make):
    x, plain = torch.randn(2, 5, 5, 5), make().bfloat16()
    layer = adapted(copy.deepcopy(plain))
    for one in (plain, layer):
        with pytest.raises(RuntimeError, match=r"(?i)bfloat16"):
            one(x)


def test_conv_takes_an_image_without_batch_axis_as_the_plain_layer_does():
    layer, calls = adapted(nn.Conv2d(3, 6, 3)), []
    x = torch.randn(3, 5, 5)
    batched = layer(x[None])[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(layer(x), batched, atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 96), lambda: nn.Conv2d(3, 6, 3)], ids=["linear", "conv"])
def test_output_may_be_changed_in_place_as_the_plain_layers_may(make):
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = adapted(make())
        x = torch.randn(2, 500, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 9)
        nn.functional.relu(layer(x), inplace=inplace).square().sum().backward()
        grads.append((layer.lora.lora_A.grad, layer.lora.lora_B.grad))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# --- Initialisation (section 4.1 of the LoRA paper; the bound is that of its authors' code) ---------------------------


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [(lambda: nn.Linear(400, 90), 400), (lambda: nn.Conv2d(40, 90, 3), 360)],
    ids=["linear", "conv"],
)
def test_untrained_pair_has_zero_B_and_kaiming_uniform_A(make, fan_in):
    layer = make()
    Adapters(nn.Sequential(layer)).add("it", [TargetLayer("0", ((0, 30), (60, 90)))], LoraSettings(16, 16.0))
    a, b = layer.lora.lora_A, layer.lora.lora_B
    assert not b.any()
    assert b.shape[:2] == (60, 16)
    assert a.shape == (32, *frozen_weight(layer).shape[1:])
    bound = 1 / math.sqrt(fan_in)
    for pair in a.detach().split(16):
        assert pair.abs().max() <= bound
        assert pair.abs().max() > 0.99 * bound
        assert pair.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(pair.mean()) < 0.05 * bound
    assert not torch.equal(a[:16], a[16:])


def test_untrained_adapter_gives_the_frozen_layers_output_bit_for_bit():
    for layer, x in [(nn.Linear(IN, OUT), torch.randn(5, IN)), (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5))]:
        frozen = layer(x)
        Adapters(nn.Sequential(layer)).add("it", [TargetLayer("0")], LoraSettings(4, 8.0))
        assert torch.equal(layer(x), frozen)


# --- x made again from the LayerNorm it came out of -------------------------------------------------------------------


class NormThenLinear(nn.Module):
    """LayerNorm and an adapted Linear; `detour` puts a copy in between, which hides the LayerNorm from the layer."""

    def __init__(self, norm: nn.Module, detour: bool, out: int = OUT, **how) -> None:
        super().__init__()
        layer = nn.Linear(norm.normalized_shape[-1], out)
        self.norm, self.linear, self.detour = norm, adapted(layer, **how), detour

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.linear(x.clone() if self.detour else x)


def norm_then_linear(
    detour: bool, train_norm: bool = True, affine: bool = True, bias: bool = True, width: int = IN, **how
) -> NormThenLinear:
    torch.manual_seed(1)
    norm = nn.LayerNorm(width, elementwise_affine=affine, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5).requires_grad_(train_norm)
    return NormThenLinear(norm, detour, **how)


def all_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(2)  # the same dropout for every model compared
    model(x).square().sum().backward()
    return {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("train_norm", [True, False], ids=["trained norm", "frozen norm"])
@pytest.mark.parametrize(
    ("affine", "bias"), [(True, True), (True, False), (False, False)], ids=["affine", "no bias", "no affine"]
)
def test_gradients_behind_a_layer_norm_equal_those_with_x_kept(affine, bias, train_norm, dropout):
    how = {"train_norm": train_norm, "affine": affine, "bias": bias, "dropout": dropout}
    x = 3 + 2 * torch.randn(2, 5, IN)
    found = all_gradients(norm_then_linear(False, **how), x)
    wanted = all_gradients(norm_then_linear(True, **how), x)
    assert found.keys() == wanted.keys()
    assert ("norm.weight" in found) == (affine and train_norm)
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 1e-5, name


def test_gradients_behind_a_layer_norm_whose_output_was_changed_since_are_of_what_it_is_now():
    grads = []
    for detour in (False, True):
        model = norm_then_linear(detour)
        model.norm.register_forward_hook(lambda module, args, output: torch.no_grad()(output.add_)(1.0))
        grads.append(all_gradients(model, torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3))))
    assert relative_error(grads[0]["linear.lora.lora_A"], grads[1]["linear.lora.lora_A"]) < 1e-5


def test_gradients_behind_a_layer_norm_pass_finite_differences():
    model = norm_then_linear(False, width=5, out=6, rank=2).double()
    inputs = [torch.randn(3, 5, dtype=torch.double, requires_grad=True), *model.norm.parameters()]
    inputs += [model.linear.lora.lora_A, model.linear.lora.lora_B]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), inputs, fast_mode=True)


def test_gradients_behind_a_layer_norm_over_two_axes_equal_those_with_x_kept():
    grads = []
    for detour in (False, True):
        torch.manual_seed(1)
        norm = nn.LayerNorm((5, IN))
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        grads.append(all_gradients(NormThenLinear(norm, detour), torch.randn(2, 5, IN).add(1)))
    for name in grads[0]:
        assert relative_error(grads[0][name], grads[1][name]) < 1e-5, name


@pytest.mark.parametrize("norm", [torch.bfloat16, torch.float32], ids=["", "its norms in float32"])
@pytest.mark.parametrize(("mean", "deviation"), [(3, 2), (30, 1)])
def test_gradients_behind_a_layer_norm_of_a_bfloat16_model_are_as_good_as_those_with_x_kept(mean, deviation, norm):
    x = mean + deviation * torch.randn(4, 32, IN)
    exact = all_gradients(norm_then_linear(True).double(), x.bfloat16().double())
    errors = []
    for detour in (False, True):
        model = norm_then_linear(detour)
        lora = model.linear.lora
        model.bfloat16()
        model.norm.to(norm)
        lora.float()
        grads = all_gradients(model, x.bfloat16())
        assert grads["linear.lora.lora_A"].dtype == torch.float32
        errors.append({name: relative_error(grads[name], exact[name]) for name in grads})
    for name, error in errors[0].items():
        assert error < 0.03, name
        assert error < 1.2 * errors[1][name] + 1e-3, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("mean", "deviation"), [(3, 2), (30, 1)])
def test_gradients_behind_a_layer_norm_under_autocast_are_as_good_as_those_with_x_kept(mean, deviation, dropout):
    x = mean + deviation * torch.randn(4, 32, IN)
    exact = all_gradients(norm_then_linear(True, dropout=dropout).double(), x.double())
    errors = []
    for detour in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            grads = all_gradients(norm_then_linear(detour, dropout=dropout), x)
        errors.append({name: relative_error(grads[name], exact[name]) for name in grads})
    for name, error in errors[0].items():
        assert error < 0.03, name
        assert error < 1.2 * errors[1][name] + 1e-3, name


def kept_bytes(y: Tensor, model: nn.Module) -> int:
    """Bytes kept for the backward of y: storages counted once, parameters not at all.

    Read from the autograd graph, not by saved_tensors_hooks: those are seen by what is measured.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, nodes, seen = {}, [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        tensors = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        tensors += getattr(node, "saved_tensors", ())
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, Tensor)):
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("half", [False, True], ids=["", "under autocast"])
@pytest.mark.parametrize("step", ["fused"], indirect=True)
def test_layer_behind_a_layer_norm_keeps_no_copy_of_x(half, dropout):
    tokens, rank = 512, 4
    x = torch.randn(tokens, IN, requires_grad=True)
    torch.manual_seed(1)
    frozen = nn.Sequential(nn.LayerNorm(IN), nn.Linear(IN, OUT)).requires_grad_(False)
    model = norm_then_linear(False, train_norm=False, rank=rank, dropout=dropout)
    h, mask = tokens * rank * 4, x.numel() if dropout else 0
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        frozen_bytes, kept = kept_bytes(frozen(x), frozen), kept_bytes(model(x), model)
    assert frozen_bytes >= x.numel() * 4
    assert kept <= 1.02 * frozen_bytes + h + mask


def test_layer_not_behind_a_layer_norm_keeps_x_once_for_all_pairs():
    tokens, rank = 512, 4
    x = torch.randn(tokens, IN)
    layer = adapted(nn.Linear(IN, OUT), rank, rows=QKV_ROWS["q, k and v of a qkv"])
    assert kept_bytes(layer(x), layer) <= x.numel() * 4 + 3 * tokens * rank * 4


def test_gradients_behind_a_layer_norm_survive_offloading_of_saved_tensors():
    x = torch.randn(2, 5, IN)
    wanted = all_gradients(norm_then_linear(False), x)
    with torch.autograd.graph.save_on_cpu():
        found = all_gradients(norm_then_linear(False), x)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5 * wanted[name].abs().max().item())


# --- Dropout ----------------------------------------------------------------------------------------------------------


def low_rank_path_of_ones(p: float, count: int) -> tuple[nn.Module, Tensor]:
    """A layer that returns dropout(x) itself: W0 = 0, A = B = 1."""
    layer = adapted(nn.Linear(1, 1, bias=False), rank=1, alpha=1.0, dropout=p)
    with torch.no_grad():
        frozen_weight(layer).zero_()
        layer.lora.lora_A.fill_(1.0)
        layer.lora.lora_B.fill_(1.0)
    return layer, torch.ones(count, 1)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_fraction_and_makes_up_for_the_rest(p):
    count = 200_000
    layer, x = low_rank_path_of_ones(p, count)
    y = layer(x).detach()
    kept = (y != 0).double().mean().item()
    deviation = math.sqrt(p * (1 - p) / count)
    assert abs(kept - (1 - p)) < 5 * deviation + 2**-16
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-3)
    assert abs(y.double().mean().item() - 1) < 5 * deviation / (1 - p)


def test_dropout_draws_elements_and_calls_independently():
    layer, x = low_rank_path_of_ones(0.5, 100_000)
    first, second = (layer(x).detach().flatten() != 0 for _ in range(2))
    assert abs((first == second).double().mean() - 0.5) < 0.01
    for lag in (1, 2, 3, 4):
        assert abs((first[lag:] == first[:-lag]).double().mean() - 0.5) < 0.01


def test_mean_over_many_dropout_draws_is_the_output_without_dropout():
    layer = adapted(nn.Linear(IN, OUT), dropout=0.25)
    x = torch.randn(3, IN)
    wanted = layer.eval()(x)
    draws = layer.train()(x.expand(4000, 3, IN)).detach()
    standard_error = draws.std(0) / math.sqrt(4000)
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - wanted).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("kind", ["linear", "conv", "1x1 conv", "behind a layer norm"])
def test_backward_uses_the_mask_of_its_forward(kind):
    if "conv" in kind:
        geometry = {"kernel_size": 1} if kind == "1x1 conv" else {"kernel_size": 2, "stride": 2, "padding": 1}
        model = layer = adapted(nn.Conv2d(2, 3, **geometry).double(), rank=2, dropout=0.4)
        x = torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True)
    elif kind == "linear":
        model = layer = adapted(nn.Linear(5, 6).double(), rank=2, dropout=0.4)
        x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    else:
        model = norm_then_linear(False, width=5, out=6, rank=2, dropout=0.4).double()
        layer, x = model.linear, torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    layer.lora.double()

    def same_draw(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model.train()(x)

    assert torch.autograd.gradcheck(same_draw, (x, layer.lora.lora_A, layer.lora.lora_B), fast_mode=True)
    with torch.no_grad():
        assert not torch.allclose(same_draw(x), model.eval()(x))


def test_dropout_acts_on_the_low_rank_path_only():
    layer = adapted(nn.Linear(IN, OUT), dropout=0.9)
    x = torch.randn(5, IN)
    nn.init.zeros_(layer.lora.lora_B)
    assert torch.equal(layer(x), F.linear(x, frozen_weight(layer), layer.bias))


def test_dropout_is_off_in_eval_and_exact_at_zero():
    x = torch.randn(5, IN)
    layer = adapted(nn.Linear(IN, OUT), dropout=0.5)
    plain = copy.deepcopy(layer)
    plain.lora.dropout = 0.0
    before = torch.random.get_rng_state()
    assert torch.equal(layer.eval()(x), plain.train()(x))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(layer.train()(x), plain(x))


@pytest.mark.parametrize(
    "p",
    [5e-6, 1e-4],
)
def test_hardly_any_dropout_drops_hardly_anything(p):
    layer, x = low_rank_path_of_ones(p, 100_000)
    assert (layer(x) != 0).double().mean() > 0.999


def test_dropout_rate_is_exact_where_it_is_no_multiple_of_a_256th():
    p, count = 0.5 / 256, 4_000_000  # half of the rows drop nothing, the others a 256th
    layer, x = low_rank_path_of_ones(p, count)
    kept = (layer(x) != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)


def test_nearly_full_dropout_still_computes():
    layer, x = low_rank_path_of_ones(0.99, 1000)
    assert layer(x).isfinite().all()
    with pytest.raises(AdapterError, match="dropout in"):
        adapted(nn.Linear(1, 1), rank=1, alpha=1.0, dropout=0.995)


# --- Autocast ---------------------------------------------------------------------------------------------------------


def plain_step(layer: nn.Module, x: Tensor, dy: Tensor, scale: float) -> list[Tensor]:
    """The step as separate layers compute it under autocast, as PEFT does."""
    x = x.detach().requires_grad_()
    a, b = (m.detach().clone().requires_grad_() for m in (layer.lora.lora_A, layer.lora.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.stride, layer.padding)
            y = F.conv2d(x, frozen_weight(layer), layer.bias, *geometry)
            y = y + F.conv2d(F.conv2d(x, a, None, *geometry), b) * scale
        else:
            y = F.linear(x, frozen_weight(layer), layer.bias) + F.linear(F.linear(x, a), b) * scale
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], dy.to(y.dtype))]


@pytest.mark.parametrize("kind", ["linear, few tokens", "linear, many tokens", "conv"])
def test_autocast_step_is_as_accurate_as_separate_layers(kind):
    if kind != "conv":
        tokens = 16 if "few" in kind else 256
        layer, x, dy = nn.Linear(IN, OUT), torch.randn(tokens, IN), torch.randn(tokens, OUT)
    else:
        layer = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        x, dy = torch.randn(4, 6, 8, 8), torch.randn(4, 12, 4, 4)
    adapted(layer)
    wanted = reference_step(layer, x, dy.bfloat16(), None, 1.5)
    plain = plain_step(layer, x, dy, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_step(layer, x, dy.bfloat16())
    assert found[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    for mine, theirs, exact in zip(found, plain, wanted, strict=True):
        assert relative_error(mine, exact) < 1.5 * relative_error(theirs, exact)
        assert relative_error(mine, exact) < 0.02


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_update_smaller_than_a_16_bit_weight_resolves_still_acts(kind, gradients):
    layer = adapted(nn.Linear(IN, OUT) if kind == "linear" else nn.Conv2d(IN, OUT, 1)).bfloat16()
    layer.lora.float()
    with torch.no_grad():
        frozen_weight(layer).fill_(1.0)  # the next number is 1.0078
        layer.lora.lora_A.fill_(1e-3)
        layer.lora.lora_B.fill_(0.1)
    x = torch.zeros(256, IN, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, -1.0  # W0 x is zero, and so is B A x but for the next line
    with torch.no_grad():
        layer.lora.lora_A[:, 0] *= 3
    update = 1.5 * 4 * 0.1 * 2e-3
    with torch.set_grad_enabled(gradients):
        y = layer(x) if kind == "linear" else layer(x[..., None, None]).flatten(1)
    assert torch.allclose(y.float(), layer.bias.float() + update, rtol=0.01)


def test_autocast_behind_a_layer_norm_gives_the_gradients_with_x_kept():
    x = torch.randn(2, 5, IN)
    grads = []
    for detour in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(all_gradients(norm_then_linear(detour), x))
    for name in grads[0]:
        assert grads[0][name].dtype == torch.float32
        assert relative_error(grads[0][name], grads[1][name]) < 0.01, name


def test_backward_outside_the_autocast_context_gives_the_same_gradients(step):
    layer, x, dy = adapted(nn.Linear(IN, OUT)), torch.randn(5, IN), torch.randn(5, OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused_step(layer, x, dy)
        x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
    y.backward(dy)
    for mine, theirs in zip([y, x.grad, layer.lora.lora_A.grad, layer.lora.lora_B.grad], inside, strict=True):
        # products that autograd makes are cast where backward is called inside
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2**-7 * theirs.abs().max() if step != "fused" else 0)


# --- Trained biases, padding by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_trained_bias_gets_its_gradient_and_the_others_stay(kind, dora):
    if kind == "linear":
        layer, x, axes = nn.Linear(IN, OUT), torch.randn(2, 5, IN), (0, 1)
    else:
        layer, x, axes = nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 5, 5), (0, 2, 3)
    model = nn.Sequential(layer)
    adapters = Adapters(model)
    adapters.add("frozen", [TargetLayer("0")], LoraSettings(4, 6.0, dora=dora))
    base = layer.bias
    adapters.add("trained", [TargetLayer("0")], LoraSettings(4, 6.0, dora=dora, bias="lora_only"))
    nn.init.normal_(layer.lora.lora_B, std=0.3)
    assert layer.bias is not base
    y = model(x)
    dy = torch.randn(y.shape)
    y.backward(dy)
    assert torch.allclose(layer.bias.grad, dy.sum(axes), atol=1e-4)
    trained = {name: p.grad.clone() for name, p in layer.lora.named_parameters()}
    with torch.no_grad():
        layer.bias.requires_grad_(False)
    layer.lora.zero_grad()
    same = model(x)
    same.backward(dy)
    assert torch.allclose(same, y, atol=1e-6)
    for name, p in layer.lora.named_parameters():
        assert relative_error(p.grad, trained[name]) < 1e-5


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("padding", "kernel"), [("same", (3, 5)), ("valid", 3)])
def test_padding_by_name_is_padding_by_number(padding, kernel, dora):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Conv2d(3, 6, kernel, padding=padding))
    model = copy.deepcopy(base)
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0")], LoraSettings(4, 6.0, dora=dora))
    nn.init.normal_(model[0].lora.lora_B, std=0.3)
    x = torch.randn(2, 3, 7, 9, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, model[0].lora.lora_A.grad]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=dora))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(model[0].lora.lora_A)
        layer.lora_B["default"].weight.copy_(model[0].lora.lora_B)
    x.grad = None
    y = theirs(x)
    y.square().sum().backward()
    for mine, its in zip(found, [y.detach(), x.grad, layer.lora_A["default"].weight.grad], strict=True):
        assert relative_error(mine, its) < 1e-5
    adapters.merge()
    assert torch.allclose(model(x), found[0], atol=1e-5)


# --- PEFT on the same weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_logits_and_gradients_equal_pefts_on_the_same_weights(rslora):
    peft = pytest.importorskip("peft")
    base = nn.Sequential()
    for name, layer in [("conv", nn.Conv2d(3, 8, 3, stride=2, padding=1)), ("act", nn.GELU()), ("flat", nn.Flatten())]:
        base.add_module(name, layer)
    base.add_module("linear", nn.Linear(8 * 4 * 4, 5))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["conv", "linear"], use_rslora=rslora)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    mine = copy.deepcopy(base)
    Adapters(mine).add("it", [TargetLayer("conv"), TargetLayer("linear")], LoraSettings(3, 5.0, rslora=rslora))
    pairs = []
    for name in ("conv", "linear"):
        peft_layer = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(peft_layer.lora_B["default"].weight, std=0.3)
        for key in ("lora_A", "lora_B"):
            matrix = getattr(peft_layer, key)["default"].weight
            ours = getattr(mine.get_submodule(name).lora, key)
            with torch.no_grad():
                ours.copy_(matrix)
            pairs.append((ours, matrix))
    images = torch.randn(4, 3, 8, 8)
    logits, their_logits = mine(images), theirs(images)
    assert not torch.allclose(their_logits, base(images), atol=1e-2)
    assert torch.allclose(logits, their_logits, atol=1e-5)
    logits.square().sum().backward()
    their_logits.square().sum().backward()
    for ours, matrix in pairs:
        assert relative_error(ours.grad, matrix.grad) < 1e-5


# --- Inside PyTorch's own machinery -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm residual MLP with both layers adapted."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        self.calls = 0
        Adapters(self).add("it", [TargetLayer("up"), TargetLayer("down")], LoraSettings(4, 6.0, dropout))
        nn.init.normal_(self.up.lora.lora_B)
        nn.init.normal_(self.down.lora.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_block_gives_the_same_gradients(dropout):
    block, x = Block(dropout), torch.randn(2, 5, IN)
    wanted = all_gradients(block, x)
    block.zero_grad()
    x = x.requires_grad_()
    torch.manual_seed(2)
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    found = {"x": x.grad} | {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5 * wanted[name].abs().max().item())


def test_checkpointed_block_runs_forward_twice_and_no_more():
    block, x = Block(), torch.randn(2, 5, IN, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=False)
    assert block.calls == 1
    y.sum().backward()
    assert block.calls == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_block_gives_the_same_gradients(backend):
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 5, IN)
    wanted = all_gradients(block, x)
    block.zero_grad()
    found = all_gradients(torch.compile(block, backend=backend), x)
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name.removeprefix("_orig_mod.")]) < 1e-5, name
    assert len(found) == len(wanted)


def test_compiled_block_is_one_graph():
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 5, IN)
    wanted = block(x)
    assert relative_error(torch.compile(block, backend="eager", fullgraph=True)(x), wanted) < 1e-6


def test_adapted_layer_type_is_the_only_thing_that_changes():
    layer = nn.Linear(IN, OUT)
    before = (id(layer), id(frozen_weight(layer)), id(layer.bias))
    adapted(layer)
    assert type(layer) is LoraLinear
    assert isinstance(layer, nn.Linear)
    assert (id(layer), id(frozen_weight(layer)), id(layer.bias)) == before
