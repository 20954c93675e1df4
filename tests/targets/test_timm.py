"""find_targets names the layers and rows that hold the projections, and refuses what it doesn't know."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import Attention
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.tiny_vit import Attention as TinyVitAttention
from torch import Tensor, nn
from torch.nn.utils import prune

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer, prove_alive
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
        (["q", "queries"], "unknown projections queries; choose from qkv, q, k, v, o, mlp, conv"),
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


def tiny(name: str, **how) -> nn.Module:
    return timm.create_model(name, img_size=32, embed_dim=24, num_classes=2, **how)


@pytest.mark.parametrize(
    ("model", "projections", "found"),
    [
        (lambda: tiny("beit_base_patch16_224", depth=1, num_heads=2), ["q", "o"], {"blocks.0.attn.qkv": ((0, 24),)}),
        (
            lambda: tiny(
                "eva02_tiny_patch14_224", depth=1, num_heads=2, patch_size=16, qkv_fused=False, scale_mlp=True
            ),
            ["v", "mlp"],
            {"blocks.0.attn.v_proj": None, "blocks.0.mlp.fc1_g": None, "blocks.0.mlp.fc1_x": None},
        ),
        (
            lambda: tiny("swin_tiny_patch4_window7_224", depths=(1,), num_heads=(2,)),
            ["k", "mlp"],
            {"layers.0.blocks.0.attn.qkv": ((24, 48),), "layers.0.blocks.0.mlp.fc2": None},
        ),
        (lambda: nn.TransformerEncoderLayer(16, 2), ["q", "o"], {"self_attn": ((0, 16),), "self_attn.out_proj": None}),
        (
            lambda: timm.create_model("levit_128s", num_classes=2),
            ["q", "v"],  # heads outside q, k and v: a pair for each head
            {
                "stages.0.blocks.0.attn.qkv.linear": tuple(
                    part for i in range(4) for part in ((64 * i, 64 * i + 16), (64 * i + 32, 64 * i + 64))
                ),
                "stages.1.downsample.attn_downsample.q.ln.linear": None,
                "stages.1.downsample.attn_downsample.kv.linear": tuple((80 * i + 16, 80 * i + 80) for i in range(8)),
            },
        ),
        (
            lambda: timm.create_model("vit_pwee_patch16_reg1_gap_256", num_classes=2),
            ["qkv", "mlp"],  # one Linear for the MLP and for q, k and v
            {"blocks.0.in_proj": ((0, 1280), (1280, 2048)), "blocks.0.mlp_out_proj": None},
        ),
        (
            lambda: timm.create_model("mobilevitv2_050", num_classes=2),
            ["q", "k", "o"],
            {
                "stages.2.1.transformer.0.attn.qkv_proj": ((0, 1), (1, 65)),
                "stages.2.1.transformer.0.attn.out_proj": None,
            },
        ),
    ],
    ids=["BEiT", "EVA-02", "Swin", "torch", "LeViT", "parallel", "MobileViTv2"],
)
def test_layers_and_rows_of_other_families(model, projections, found):
    targets = {target.name: target.rows for target in find_targets(model(), projections)}
    assert {name: targets.get(name, "missing") for name in found} == found


def test_projection_that_only_some_blocks_have_is_adapted_in_those():
    model = timm.create_model("gcvit_xxtiny", num_classes=2)
    per_block = [target.rows for target in find_targets(model, ["q"])]
    assert 0 < len(per_block) < len(names(find_targets(model, ["k"])))
    assert {len(rows) for rows in per_block} == {1}
    with_global_query = model.stages[0].blocks[1].attn
    assert with_global_query.use_global
    targets = {target.name: target.rows for target in find_targets(model, ["k", "v"])}
    assert targets["stages.0.blocks.1.attn.qkv"] == ((0, 64), (64, 128))
    assert targets["stages.0.blocks.0.attn.qkv"] == ((64, 128), (128, 192))


def test_projection_that_no_block_has_is_refused_with_what_there_is():
    model = timm.create_model("botnet26t_256", num_classes=2)
    with pytest.raises(AdapterError, match=r"ByobNet has no o in the chosen blocks \(BottleneckAttn has k, q, v\)"):
        find_targets(model, ["qkv", "o"])


class HomeMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)


class HomeMadeAttention(nn.Module):
    pass


@pytest.mark.parametrize("cls", [HomeMade, HomeMadeAttention])
@pytest.mark.parametrize("beside", [True, False], ids=["beside known attention", "alone"])
def test_attention_of_an_unknown_class_is_refused_by_its_name(cls, beside):
    model = nn.Sequential(vit(1), cls()) if beside else nn.Sequential(cls())
    with pytest.raises(AdapterError, match=rf"Sequential holds attention of a family .*test_timm.{cls.__name__};"):
        find_targets(model, ["q"])


def test_subclass_of_a_known_attention_is_known():
    class Quiet(Attention):
        pass

    model = vit(1)
    model.blocks[0].attn.__class__ = Quiet
    assert names(find_targets(model, ["o"])) == ["blocks.0.attn.proj"]


@pytest.mark.parametrize("dora", [False, True])
def test_targets_are_the_same_while_an_adapter_acts_on_them(dora):
    model = timm.create_model("poolformerv2_s12", num_classes=0)
    found = find_targets(model, ["conv"])
    Adapters(model).add("some", found[:3], LoraSettings(2, 4, dora=dora))
    assert find_targets(model, ["conv"]) == found


@pytest.mark.parametrize("name", ["resnet18", "poolformerv2_s12", "legacy_seresnet18"])
def test_model_without_attention_is_refused(name):
    with pytest.raises(AdapterError, match="holds no attention to adapt"):
        find_targets(timm.create_model(name, num_classes=2), ["q"])


def test_convolutions_of_a_model_without_attention():
    model = timm.create_model("resnet18", num_classes=2)
    found = names(find_targets(model, ["conv"]))
    assert found == [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "size", "ends"),
    [
        ("convnext_atto", {}, ("fc1", "fc2")),  # convolutions of one pixel
        ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}, ("fc1", "fc2")),
        ("mixer_s32_224", {}, ("fc1", "fc2")),  # over channels, and over patches
        ("resmlp_12_224", {}, ("fc1", "fc2")),
    ],
)
def test_feed_forward_layers_of_a_model_without_attention_are_alive(name, size, ends):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **size)
    for module in model.modules():  # LayerScale hides what is behind it at 1e-6
        if hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):
            nn.init.ones_(module.gamma)
    found = find_targets(model, ["mlp"])
    assert names(found) == [
        n for n, m in model.named_modules() if n.endswith(ends) and isinstance(m, nn.Linear | nn.Conv2d)
    ]
    assert not set(names(found)) & set(names(find_targets(model, ["conv"])))
    last = names(find_targets(model, ["mlp"], "last:1"))
    assert last == names(found)[-len(last) :]
    assert len({one.rpartition(".mlp")[0] for one in last}) == 1
    Adapters(model).add("it", found, LoraSettings(2, 4.0))
    prove_alive(model, lambda: model(torch.randn(2, 3, 224, 224)))


def test_projections_are_a_list():
    with pytest.raises(AdapterError, match=r"projections='qkv': expected a list, \['qkv'\]"):
        find_targets(vit(1), "qkv")


def test_a_model_without_attention_or_feed_forward_layers_has_no_mlp():
    with pytest.raises(AdapterError, match=r"ResNet has no mlp in the chosen blocks \(no attention\); leave it out"):
        find_targets(timm.create_model("resnet18", num_classes=2), ["mlp", "conv"])


def test_convolutions_are_the_ungrouped_ones_that_are_neither_projections_nor_mlps():
    model = timm.create_model("pvt_v2_b0", num_classes=2)
    found = names(find_targets(model, ["conv"]))
    assert "patch_embed.proj" in found
    assert "stages.0.blocks.0.attn.sr" in found
    assert all(model.get_submodule(name).groups == 1 for name in found)
    assert not any("mlp" in name for name in found)
    assert names(find_targets(model, ["conv"], [0])) == ["stages.0.blocks.0.attn.sr"]


def test_projections_that_are_convolutions_are_left_to_their_own_words():
    model = timm.create_model("mobilevitv2_050", num_classes=2)
    convolutions = names(find_targets(model, ["conv"]))
    for word in ("qkv", "o", "mlp"):
        others = names(find_targets(model, [word]))
        assert isinstance(model.get_submodule(others[0]), nn.Conv2d)
        assert not {*others} & {*convolutions}
    assert "stages.0.0.conv1_1x1.conv" in convolutions


def test_mlp_without_depthwise_convolution():
    model = timm.create_model("pvt_v2_b0", num_classes=2)
    assert names(find_targets(model, ["mlp"], [0])) == ["stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.fc2"]


def test_mlps_that_make_position_biases_are_left_alone():
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=2)
    assert not [name for name in names(find_targets(model, ["mlp"])) if "cpb" in name]


def test_pooling_head_goes_with_the_last_block():
    model = timm.create_model("test_vit3", num_classes=2)
    wanted = [f"blocks.{len(model.blocks) - 1}.attn.proj", "attn_pool.proj"]
    assert names(find_targets(model, ["o"], "last:1")) == wanted
    assert {"attn_pool.q", "attn_pool.kv"} <= set(names(find_targets(model, ["qkv"], -1)))
    assert "attn_pool.proj" not in names(find_targets(model, ["o"], 0))


def test_layers_of_modules_trained_in_full_are_left_out():
    model = timm.create_model("resnet50_clip", num_classes=2)
    assert names(find_targets(model, ["v", "o"])) == ["head.v", "head.proj"]
    assert names(find_targets(model, ["v", "o"], trained=["head.proj"])) == ["head.v"]


def test_block_without_an_mlp_is_refused():
    model = vit(1)
    model.blocks[0].mlp = nn.Identity()
    with pytest.raises(AdapterError, match=r"has no mlp in the chosen blocks"):
        find_targets(model, ["mlp"])
    assert names(find_targets(model, ["o"])) == ["blocks.0.attn.proj"]


@pytest.mark.parametrize("projections", [["qkv"], ["q", "v"]], ids=",".join)
@pytest.mark.parametrize("how", ["pruned", "separate weights"])
def test_attention_without_one_plain_weight_is_left_to_the_error_that_tells_why(how, projections):
    model = vit(1)
    if how == "pruned":
        prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    else:
        model.blocks[0].attn = nn.MultiheadAttention(DIM, 3, kdim=24, vdim=24)
    targets = find_targets(model, projections)
    with pytest.raises(AdapterError, match="computes its weight" if how == "pruned" else "separate weights"):
        Adapters(model).add("it", targets, LoraSettings(2, 4.0))


ATTENTION_OF_THEIR_OWN = {
    "HaloNet": (lambda: HaloAttn(16, feat_size=(8, 8), num_heads=2, block_size=4, halo_size=1, qk_ratio=0.5), 4),
    "LambdaNet": (lambda: LambdaLayer(16, feat_size=(8, 8), num_heads=2, dim_head=8, qk_ratio=0.5), 4),
    "MaxViT": (lambda: Attention2d(16, dim_head=8, head_first=True), 4),
    "CoAtNet": (lambda: Attention2d(16, dim_head=8, head_first=False), 4),
    "MaxViT, channels last": (lambda: AttentionCl(16, dim_head=8, head_first=True), 3),
    "CoAtNet, channels last": (lambda: AttentionCl(16, dim_head=8, head_first=False), 3),
    "EfficientFormer": (lambda: EfficientFormerAttention(16, key_dim=4, num_heads=2, resolution=8), 3),
    "TinyViT": (lambda: TinyVitAttention(16, key_dim=4, num_heads=2, attn_ratio=2, resolution=(8, 8)), 3),
}


@pytest.mark.parametrize(("build", "dims"), ATTENTION_OF_THEIR_OWN.values(), ids=ATTENTION_OF_THEIR_OWN)
def test_rows_of_v_are_those_that_attention_is_linear_in(build, dims):
    torch.manual_seed(0)
    attention = build().double()
    attention.eval()  # which returns nothing in two of these classes
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.3)
    x = torch.randn((2, 16, 8, 8) if dims == 4 else (2, 64, 16), dtype=torch.double)
    model = nn.Sequential(attention)

    @torch.no_grad()
    def bends(projection: str, rows: Callable[[list[int]], list[list[int]]]) -> list[float]:
        """How far the output is from linear in parts of the projection's rows, as a share of how far it moves."""
        (target,) = find_targets(model, [projection])
        weight, found = model.get_submodule(target.name).weight, []
        own = [row for start, stop in target.rows or ((0, len(weight)),) for row in range(start, stop)]
        before, noise = weight.clone(), torch.randn_like(weight)
        for part in rows(own):
            outputs = []
            for size in (0, 1, 2):
                weight[part] = before[part] + size * noise[part]
                outputs.append(model(x))
            weight.copy_(before)
            plain, once, twice = outputs
            found.append(((twice - 2 * once + plain).norm() / (twice - plain).norm()).item())
        return found

    assert bends("v", lambda rows: [rows])[0] < 1e-12
    assert min(bends("k", lambda rows: [[row] for row in rows])) > 1e-5
