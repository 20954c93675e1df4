"""Adapters of nn.MultiheadAttention open in PEFT, and PEFT's open here, with the same output."""

import peft
import pytest
import torch
from torch import Tensor, nn

from vislora.formats.peft import read_peft, write_peft
from vislora.lora import Adapters, LoraSettings, LowRank, TargetLayer
from vislora.targets.timm import find_targets

DIM = 24


class Tower(nn.Module):
    """As in open_clip: attention of torch, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.mlp = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x, x, x, need_weights=False)[0])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, DIM)


def tower() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict({"blocks": nn.Sequential(Tower(), Tower())})["blocks"].eval()


def trained(targets: list[TargetLayer], settings: LoraSettings) -> tuple[nn.Module, Adapters]:
    model = tower()
    adapters = Adapters(model)
    adapters.add("it", targets, settings)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.lora_B, std=0.3)
    return model, adapters


def summed(theirs: nn.Module) -> nn.Module:
    """The plain tower with the updates that PEFT tells of each layer. Its own forward isn't asked, since PEFT 0.21 adds
    that of the output projection twice."""
    plain = tower()
    with torch.no_grad():
        for block, wrapped in zip(plain, theirs.base_model.model, strict=True):
            if isinstance(wrapped.attn, peft.tuners.lora.layer.MultiheadAttention):
                block.attn.in_proj_weight += wrapped.attn.get_delta_weight("default")
                block.attn.out_proj.weight += wrapped.attn.base_layer.out_proj.get_delta_weight("default")
                block.attn.in_proj_bias.copy_(wrapped.attn.base_layer.in_proj_bias)
                block.attn.out_proj.bias.copy_(wrapped.attn.base_layer.out_proj.get_base_layer().bias)
            block.mlp.bias.copy_(wrapped.mlp.bias)
            if isinstance(wrapped.mlp, peft.tuners.lora.Linear):
                block.mlp.weight += wrapped.mlp.get_delta_weight("default")
    return plain


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("parts", [["qkv", "o"], ["q", "v", "o"], ["k", "o", "mlp"], ["qkv"]], ids=" ".join)
@pytest.mark.parametrize("ranks", [{}, {r"attn\.out_proj": 5}, {r"0\.attn": 6}], ids=["one rank", "wide o", "wide 0"])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT adapts o with q, k and v, from zero
def test_written_adapter_gives_the_same_output_in_peft_and_here(tmp_path, x, parts, ranks, rslora):
    if parts == ["qkv"] and r"attn\.out_proj" in ranks:
        pytest.skip("a pattern for what isn't adapted")
    model, adapters = trained(find_targets(tower(), parts), LoraSettings(3, 4.0, rslora=rslora, rank_pattern=ranks))
    wanted = model(x)
    assert not torch.allclose(wanted, tower()(x), atol=1e-2)
    write_peft(adapters.adapter("it"), tmp_path)
    assert torch.allclose(summed(peft.PeftModel.from_pretrained(tower(), str(tmp_path)))(x), wanted, atol=1e-5)
    here = tower()
    Adapters(here).load("it", read_peft(tmp_path))
    assert torch.allclose(here(x), wanted, atol=1e-5)


def test_ranks_are_filled_up_without_rounding_where_another_dtype_is_the_default(tmp_path, x):
    settings = LoraSettings(3, 4.0, rank_pattern={r"attn\.out_proj": 5})
    model, adapters = trained(find_targets(tower(), ["qkv", "o"]), settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        write_peft(adapters.adapter("it"), tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    here = tower()
    Adapters(here).load("it", read_peft(tmp_path))
    assert torch.allclose(here(x), model(x), atol=1e-5)


@pytest.mark.parametrize("without", ["attn", "out_proj", "attn|out_proj"])
def test_layers_of_alpha_0_stay_off_beside_others(tmp_path, x, without):
    settings = LoraSettings(3, 4.0, alpha_pattern=dict.fromkeys(without.split("|"), 0.0))
    model, adapters = trained(find_targets(tower(), ["qkv", "o", "mlp"]), settings)
    wanted = model(x)
    write_peft(adapters.adapter("it"), tmp_path)
    assert torch.allclose(summed(peft.PeftModel.from_pretrained(tower(), str(tmp_path)))(x), wanted, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("parts", [["qkv", "o"], ["q", "v"]], ids=" ".join)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_trained_biases_of_an_attention_give_the_same_output_in_peft_and_here(tmp_path, x, parts, bias):
    model, adapters = trained(find_targets(tower(), parts), LoraSettings(3, 4.0, bias=bias))
    without = model(x)
    moved = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert "0.attn.in_proj_bias" in moved
    assert ("0.attn.out_proj.bias" in moved) == ("o" in parts or bias == "all")
    for name in moved:
        nn.init.normal_(model.get_parameter(name), std=0.3)
    wanted = model(x)
    assert not torch.allclose(wanted, without, atol=1e-2)
    write_peft(adapters.adapter("it"), tmp_path)
    assert read_peft(tmp_path).biases.keys() == moved
    theirs = peft.PeftModel.from_pretrained(tower(), str(tmp_path))
    assert theirs.peft_config["default"].bias == bias
    assert torch.allclose(summed(theirs)(x), wanted, atol=1e-5)
    here = tower()
    Adapters(here).load("it", read_peft(tmp_path))
    assert torch.allclose(here(x), wanted, atol=1e-5)


def test_adapter_trained_by_peft_gives_the_same_output_here(tmp_path, x):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["attn", "mlp"], init_lora_weights=False)
    theirs = peft.get_peft_model(tower(), config)
    theirs.save_pretrained(tmp_path)
    model = tower()
    Adapters(model).load("it", read_peft(tmp_path))
    assert not torch.allclose(model(x), tower()(x), atol=1e-3)
    assert torch.allclose(model(x), summed(theirs)(x), atol=1e-5)
