"""find_targets names the layers and rows that hold the projections, and refuses what it doesn't know."""

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.targets.timm import find_targets

DIM = 48


def vit(depth: int = 3) -> nn.Module:
    size = {"img_size": 32, "depth": depth, "embed_dim": DIM, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size).eval()


def names(targets: list[TargetLayer]) -> list[str]:
    return [target.name for target in targets]


def heads_inputs(attention: Attention, x: Tensor) -> dict[str, Tensor]:
    """What timm itself takes for q and k (the inputs of their norms), the fused output, and the attention's result."""
    seen = {}
    hooks = [
        attention.q_norm.register_forward_hook(lambda m, args, out: seen.__setitem__("q", out.clone())),
        attention.k_norm.register_forward_hook(lambda m, args, out: seen.__setitem__("k", out.clone())),
        attention.qkv.register_forward_hook(lambda m, args, out: seen.__setitem__("all", out.clone())),
    ]
    with torch.no_grad():
        seen["output"] = attention(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("chosen", "projection"),
    [(chosen, projection) for chosen in (["q", "v"], ["k"], ["v", "k", "q"], ["q", "k"]) for projection in chosen],
)
def test_pair_of_a_projection_moves_that_projection_and_no_other(chosen, projection):
    model = vit(1)
    targets = find_targets(model, chosen)
    assert names(targets) == ["blocks.0.attn.qkv"]
    x = torch.randn(2, 5, DIM)
    attention = model.blocks[0].attn
    before = heads_inputs(attention, x)
    Adapters(model).add("it", targets, LoraSettings(4, 4.0))
    assert torch.equal(heads_inputs(attention, x)["all"], before["all"])
    pair = [name for name in "qkv" if name in chosen].index(projection)
    nn.init.normal_(attention.qkv.lora.lora_B[pair * DIM : (pair + 1) * DIM])
    after = heads_inputs(attention, x)
    # v passes no norm, so it is the third that moves neither q nor k and still the result
    assert torch.equal(after["q"], before["q"]) == (projection != "q")
    assert torch.equal(after["k"], before["k"]) == (projection != "k")
    assert not torch.allclose(after["output"], before["output"])
    moved = (after["all"] != before["all"]).any(0).any(0)
    assert moved.sum() == DIM
    assert moved["qkv".index(projection) * DIM :][:DIM].all()


def test_qkv_is_one_pair_over_all_rows():
    targets = find_targets(vit(2), ["qkv"])
    assert targets == [TargetLayer("blocks.0.attn.qkv"), TargetLayer("blocks.1.attn.qkv")]


def test_every_projection_is_found_in_every_block():
    per_block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    wanted = [f"blocks.{i}.{name}" for i in range(2) for name in per_block]
    model = vit(2)
    assert names(find_targets(model, ["q", "k", "v", "o", "mlp"])) == wanted
    assert names(find_targets(model, ["mlp"])) == [n for n in wanted if ".mlp." in n]
    assert names(find_targets(model, ["o"])) == [n for n in wanted if n.endswith(".proj")]
    assert all(type(model.get_submodule(name)) is nn.Linear for name in wanted)


@pytest.mark.parametrize(
    ("blocks", "found"),
    [(None, [0, 1, 2]), ([0], [0]), ([-1], [2]), ([2, 0], [0, 2]), ([-1, 2, 2], [2]), ([-3], [0]), ([], [])],
)
def test_blocks_count_from_either_end_and_once(blocks, found):
    assert names(find_targets(vit(), ["o"], blocks)) == [f"blocks.{i}.attn.proj" for i in found]


def test_relatives_with_the_same_attention_are_found():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=DIM, num_heads=3)
    assert names(find_targets(model, ["q", "mlp"])) == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        (["q", "queries"], "unknown projections queries; choose from qkv, q, k, v, o, mlp"),
        ([], "no projections to adapt"),
        (["qkv", "q"], "either qkv as a whole or its parts"),
        (["v", "o", "qkv"], "either qkv as a whole or its parts"),
    ],
)
def test_projections_that_make_no_sense_are_refused(projections, message):
    with pytest.raises(AdapterError, match=message):
        find_targets(vit(1), projections)


@pytest.mark.parametrize("block", [3, -4, 12])
def test_block_out_of_range_is_named_with_the_range(block):
    with pytest.raises(AdapterError, match=rf"block {block} isn't there; the model has 3, 0 to 2 or -3 to -1"):
        find_targets(vit(), ["q"], [0, block])


@pytest.mark.parametrize(
    ("name", "how", "attention"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}, "Attention"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "depths": (1,), "embed_dim": 24, "num_heads": (2,)},
            "Window",
        ),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}, "EvaAttention"),
    ],
)
def test_attention_of_another_family_is_refused_by_its_name(name, how, attention):
    model = timm.create_model(name, num_classes=2, **how)
    with pytest.raises(AdapterError, match=f"{type(model).__name__} holds attention of a family .*: {attention}"):
        find_targets(model, ["q"])


def test_torch_multihead_attention_is_refused_by_its_name():
    with pytest.raises(AdapterError, match="MultiheadAttention"):
        find_targets(nn.TransformerEncoderLayer(16, 2), ["q"])


def test_foreign_attention_beside_known_attention_is_refused():
    with pytest.raises(AdapterError, match=r"Sequential holds attention of a family .*: MultiheadAttention"):
        find_targets(nn.Sequential(vit(1), nn.MultiheadAttention(16, 2)), ["q"])


def test_model_without_attention_is_refused():
    with pytest.raises(AdapterError, match="Sequential holds no attention to adapt"):
        find_targets(nn.Sequential(nn.Linear(3, 3)), ["q"])


def test_mlp_of_an_unknown_class_is_refused():
    model = vit(1)
    model.blocks[0].mlp = nn.Sequential(nn.Linear(DIM, DIM))
    with pytest.raises(AdapterError, match=r"blocks.0 has no MLP of a known class"):
        find_targets(model, ["mlp"])
    assert names(find_targets(model, ["o"])) == ["blocks.0.attn.proj"]
