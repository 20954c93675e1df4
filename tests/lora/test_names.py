"""Modules by name are those that torch finds; patterns fit what PEFT has them fit."""

import pytest
import tiny_diffusion as tiny
import torch
from torch import nn

from vislora.errors import AdapterError
from vislora.lora.names import fits, submodule

get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key


def test_modules_are_those_that_torch_finds_by_their_names():
    model = tiny.unet()
    for name, module in model.named_modules(remove_duplicate=False):
        assert submodule(model, name) is module
    for name in ("mid_block.nothing", "conv_in.weight", "config", "nothing.at.all"):
        assert submodule(model, name) is None
    compiled = torch.compile(model)  # answers by its names too, and by the model's
    assert submodule(nn.ModuleDict({"unet": compiled}), "unet.mid_block") is model.mid_block


@pytest.mark.parametrize(
    "pattern", ["qkv", "attn.qkv", r"\d\.attn\.qkv", "^blocks.1.attn.qkv", "^attn.qkv", "v", "proj|qkv"]
)
def test_patterns_fit_where_pefts_do(pattern):
    for name in ("blocks.1.attn.qkv", "attn.qkv", "qkv", "blocks.1.attn.proj", "blocks.1.attn.qk"):
        assert fits(pattern, name) == (get_pattern_key([pattern], name) is pattern)


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(AdapterError, match=r"the pattern '\(' isn't a regular expression"):
        fits("(", "qkv")
