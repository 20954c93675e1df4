"""PiSSA: the principal pair, what stays of the frozen weight, and the plain LoRA that comes out, against PEFT."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer, frozen_weight
from vislora.lora.pissa import principal_pair

peft = pytest.importorskip("peft")

IN, OUT = 24, 36
PISSA = LoraSettings(4, 6.0, pissa=True)


def base() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def adapted(settings: LoraSettings = PISSA, rows=None) -> tuple[nn.Module, Adapters]:
    model = base()
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0", rows)], settings)
    return model, adapters


def train(model: nn.Module, steps: int = 5) -> None:
    x = torch.randn(16, IN, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def in_peft(**config) -> nn.Module:
    return peft.get_peft_model(
        base(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa", **config)
    )


def inputs() -> Tensor:
    return torch.randn(7, IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_product_and_residual_are_pefts(rslora):
    model, _ = adapted(LoraSettings(4, 6.0, rslora=rslora, pissa=True))
    theirs = in_peft(use_rslora=rslora).base_model.model[0]
    low = model[0].lora
    product = low.scale * low.start_B @ low.start_A
    their_product = theirs.scaling["default"] * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(product, their_product, atol=1e-5)
    assert torch.allclose(frozen_weight(model[0]) - product, theirs.base_layer.weight, atol=1e-5)
    assert torch.equal(low.lora_A, low.start_A)


def test_product_is_the_best_approximation_of_its_rank():
    weight = torch.randn(20, 12, dtype=torch.double)
    a, b = principal_pair(weight, 3, 0.7)
    error = (weight - 0.7 * b.double() @ a.double()).square().sum()
    assert torch.allclose(error, torch.linalg.svdvals(weight)[3:].square().sum(), rtol=1e-5)


def test_untrained_it_changes_nothing():
    model, _ = adapted()
    assert torch.allclose(model(inputs()), base()(inputs()), atol=1e-5)


def test_training_takes_pefts_path():
    model, _ = adapted()
    theirs = in_peft()
    train(model)
    train(theirs)
    assert (model(inputs()) - base()(inputs())).abs().max() > 0.05
    assert torch.allclose(model(inputs()), theirs(inputs()), atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("rows", [None, ((0, 12), (24, 36))], ids=["all rows", "some rows"])
def test_value_is_a_plain_lora_of_twice_the_rank_on_the_original_weights(rows, rslora):
    model, adapters = adapted(LoraSettings(4, 6.0, rslora=rslora, pissa=True), rows)
    train(model)
    value = adapters.adapter("it")
    assert value.layers["0"].rank == 8
    assert value.layers["0"].scale == pytest.approx(model[0].lora.scale)
    plain = base()
    Adapters(plain).load("it", value)
    assert torch.allclose(plain(inputs()), model(inputs()), atol=1e-5)


def test_value_is_pefts_own_conversion(tmp_path):
    theirs = in_peft()
    theirs.peft_config["default"].init_lora_weights = True  # as its documentation has it
    theirs.save_pretrained(str(tmp_path / "start"))
    model, adapters = adapted()
    low, layer = model[0].lora, theirs.base_model.model[0]
    with torch.no_grad():
        for mine, its in ((low.lora_A, layer.lora_A), (low.lora_B, layer.lora_B)):
            change = 0.1 * torch.randn(mine.shape)
            mine.copy_(its["default"].weight + change)
            its["default"].weight.add_(change)
    theirs.save_pretrained(str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = peft.PeftModel.from_pretrained(base(), str(tmp_path / "end")).base_model.model[0]
    value = adapters.adapter("it").layers["0"]
    delta = value.scale * value.lora_B @ value.lora_A
    assert torch.allclose(delta, converted.get_delta_weight("default"), atol=1e-5)


def test_frozen_weight_stays_and_comes_back_bit_for_bit():
    model, adapters = adapted()
    weight = base()[0].weight
    train(model)
    assert torch.equal(frozen_weight(model[0]), weight)
    trained = model(inputs())
    adapters.merge()
    assert torch.allclose(model(inputs()), trained, atol=1e-5)
    adapters.unmerge()
    adapters.scale("it", 0.0)
    assert torch.allclose(model(inputs()), base()(inputs()), atol=1e-6)
    adapters.remove("it")
    assert torch.equal(frozen_weight(model[0]), weight)
    assert torch.equal(model(inputs()), base()(inputs()))


def test_convolution_starts_unchanged_and_merges_to_what_it_computes():
    layer = nn.Conv2d(4, 6, 3, padding=1)
    model = nn.Sequential(copy.deepcopy(layer))
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0")], PISSA)
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(model(x), layer(x), atol=1e-5)
    with torch.no_grad():
        model[0].lora.lora_A.mul_(1.5)
    trained = model(x)
    assert not torch.allclose(trained, layer(x), atol=1e-2)
    adapters.merge()
    assert torch.allclose(model(x), trained, atol=1e-5)


@pytest.mark.parametrize("settings", [{"dora": True}, {"dropout": 0.1}])
def test_dora_and_dropout_are_refused(settings):
    with pytest.raises(AdapterError, match="PiSSA goes with neither DoRA nor dropout"):
        adapted(LoraSettings(4, 6.0, pissa=True, **settings))


def test_rank_beyond_the_singular_values_is_refused():
    with pytest.raises(AdapterError, match="PiSSA of rank 25 needs as many singular values; a 36 x 24 weight has 24"):
        adapted(LoraSettings(25, 6.0, pissa=True))


@pytest.mark.parametrize("settings", [LoraSettings(4, a, pissa=a <= 0) for a in (-6.0, 0.0, math.nan)])
def test_alpha_without_a_root_or_a_value_is_refused(settings):
    with pytest.raises(AdapterError, match=r"alpha=(-6\.0|0\.0|nan): expected a number"):
        adapted(settings)
