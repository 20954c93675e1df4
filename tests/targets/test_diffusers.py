"""find_targets finds layers that act, in every class that is named, and refuses what it doesn't know by its name."""

import copy
import warnings
from collections.abc import Callable

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
import transformers
from diffusers.models.embeddings import HunyuanDiTAttentionPool, MochiAttentionPool
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5TransformerDecoderBlock
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer, prove_alive
from vislora.targets.diffusers import find_targets

STEPS = torch.tensor([3, 7])


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def run_unet(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), STEPS, draws(2, 5, tiny.WIDTH)).sample


def run_sdxl(model: nn.Module) -> Tensor:
    added = {"text_embeds": draws(2, tiny.WIDTH), "time_ids": draws(2, 6)}
    return model(draws(2, 4, 8, 8), STEPS, draws(2, 5, 2 * tiny.WIDTH), added_cond_kwargs=added).sample


def run_plain_unet(model: nn.Module) -> Tensor:
    return model(draws(2, 3, 8, 8), STEPS).sample


def run_motion(model: nn.Module) -> Tensor:
    return model(draws(1, 4, 3, 8, 8), STEPS[:1], draws(3, 5, tiny.WIDTH)).sample


def run_sd3(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), draws(2, 5, 8), draws(2, 16), STEPS).sample


def run_flux(model: nn.Module) -> Tensor:
    return model(
        hidden_states=draws(2, 6, 4),
        encoder_hidden_states=draws(2, 3, 8),
        pooled_projections=draws(2, 8),
        timestep=torch.tensor([0.3, 0.6]),
        img_ids=draws(6, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def run_flux2(model: nn.Module) -> Tensor:
    return model(
        hidden_states=draws(2, 6, 4),
        encoder_hidden_states=draws(2, 3, 8),
        timestep=torch.tensor([0.3, 0.6]),
        img_ids=torch.zeros(2, 6, 4),
        txt_ids=torch.zeros(2, 3, 4),
        guidance=torch.tensor([1.0, 2.0]),
    ).sample


def run_pixart(model: nn.Module) -> Tensor:
    nothing = {"resolution": None, "aspect_ratio": None}
    return model(draws(2, 4, 8, 8), draws(2, 5, 6), STEPS, added_cond_kwargs=nothing).sample


def run_dit(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), STEPS, torch.tensor([1, 2])).sample


def run_auraflow(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), draws(2, 5, 8), torch.tensor([0.3, 0.6])).sample


def run_sana(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), draws(2, 5, 8), STEPS).sample


def run_lumina2(model: nn.Module) -> Tensor:
    return model(draws(2, 4, 8, 8), torch.tensor([0.3, 0.6]), draws(2, 5, 8), torch.ones(2, 5).bool()).sample


def run_wan(model: nn.Module) -> Tensor:
    return model(draws(1, 4, 2, 8, 8), STEPS[:1], draws(1, 5, 16)).sample


def run_mochi(model: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast, but")  # into float32, which it asks for
        return model(draws(2, 4, 1, 8, 8), draws(2, 5, 8), STEPS, torch.ones(2, 5).bool()).sample


def run_krea(model: nn.Module) -> Tensor:
    places = torch.zeros(5 + 4, 3)
    places[5:, 1:] = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    return model(draws(2, 4, 4), draws(2, 5, 3, 8), torch.tensor([0.3, 0.6]), places).sample


def run_qwen(model: nn.Module) -> Tensor:
    text, mask = draws(2, 5, 16), torch.ones(2, 5, dtype=torch.long)
    lengths = {"txt_seq_lens": [5, 5]} if tiny.DIFFUSERS < (0, 37) else {}
    return model(draws(2, 16, 16), text, mask, torch.tensor([0.3, 0.6]), [[(1, 4, 4)]] * 2, **lengths).sample


def run_text(model: nn.Module) -> Tensor:
    words = torch.tensor([[52, 1, 2, 3, 53], [52, 7, 8, 9, 53]])
    output = model(words)
    return output.last_hidden_state if "last_hidden_state" not in vars(output) else output[0]


PATCHES = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}
EVERY = ("q", "k", "v", "o", "mlp")

# name: (how it is built, how it is run, what it is asked for)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], tuple[str, ...]]] = {
    "UNet2DConditionModel": (tiny.unet, run_unet, (*EVERY, "proj", "conv")),
    "UNet2DConditionModel, SDXL": (tiny.unet_sdxl, run_sdxl, (*EVERY, "proj", "conv")),
    "UNet2DConditionModel, GLIGEN": (lambda: tiny.unet(attention_type="gated"), run_unet, (*EVERY, "proj", "conv")),
    "UNet2DModel": (
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        run_plain_unet,
        ("q", "k", "v", "o", "conv"),
    ),
    "UNetMotionModel": (
        lambda: diffusers.UNetMotionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            cross_attention_dim=tiny.WIDTH,
            num_attention_heads=2,
            norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        ),
        run_motion,
        (*EVERY, "proj", "conv"),
    ),
    "SD3Transformer2DModel": (
        lambda: diffusers.SD3Transformer2DModel(
            **PATCHES,
            **HEADS,
            num_layers=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        ),
        run_sd3,
        EVERY,
    ),
    "SD3Transformer2DModel, 3.5": (
        lambda: diffusers.SD3Transformer2DModel(
            **PATCHES,
            **HEADS,
            num_layers=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        run_sd3,
        EVERY,
    ),
    "FluxTransformer2DModel": (
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        ),
        run_flux,
        EVERY,
    ),
    "Flux2Transformer2DModel": (
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        run_flux2,
        EVERY,
    ),
    "PixArtTransformer2DModel": (
        lambda: diffusers.PixArtTransformer2DModel(
            **PATCHES,
            **HEADS,
            num_layers=2,
            cross_attention_dim=8,
            caption_channels=6,
            use_additional_conditions=False,
        ),
        run_pixart,
        EVERY,
    ),
    "DiTTransformer2DModel": (
        lambda: diffusers.DiTTransformer2DModel(
            **PATCHES | {"patch_size": 2}, **HEADS, num_layers=2, num_embeds_ada_norm=10
        ),
        run_dit,
        EVERY,
    ),
    "AuraFlowTransformer2DModel": (
        lambda: diffusers.AuraFlowTransformer2DModel(
            **PATCHES,
            **HEADS,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pos_embed_max_size=16,
        ),
        run_auraflow,
        EVERY,
    ),
    "SanaTransformer2DModel": (
        lambda: diffusers.SanaTransformer2DModel(
            **PATCHES | {"patch_size": 1},
            **HEADS,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
        ),
        run_sana,
        ("q", "k", "v", "o"),
    ),
    "Lumina2Transformer2DModel": (
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(32, 8, 8),
            cap_feat_dim=8,
        ),
        run_lumina2,
        EVERY,
    ),
    "WanTransformer3DModel": (
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        run_wan,
        EVERY,
    ),
    "QwenImageTransformer2DModel": (
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        run_qwen,
        EVERY,
    ),
    "CLIPTextModel": (tiny.clip, run_text, EVERY),
    "MochiTransformer3DModel": (
        lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=8,
            time_embed_dim=8,
        ),
        run_mochi,
        EVERY,
    ),
    "CLIPTextModelWithProjection": (lambda: tiny.clip(transformers.CLIPTextModelWithProjection), run_text, EVERY),
    "T5EncoderModel": (lambda: tiny.t5("relu"), run_text, EVERY),
    "T5EncoderModel, gated": (tiny.t5, run_text, EVERY),
}


if hasattr(diffusers, "Krea2Transformer2DModel"):
    MODELS["Krea2Transformer2DModel"] = (
        lambda: diffusers.Krea2Transformer2DModel(
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            timestep_embed_dim=8,
            text_hidden_dim=8,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        run_krea,
        EVERY,
    )


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


def names(targets: list[TargetLayer]) -> list[str]:
    return [target.name for target in targets]


def adapted(model: nn.Module, targets: list[TargetLayer]) -> Adapters:
    """With random numbers in every lora_B, as training would leave them."""
    adapters = Adapters(model)
    adapters.add("it", targets, LoraSettings(2, 3.0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


def by_hand(model: nn.Module, adapters: Adapters) -> nn.Module:
    """A copy of the bare model whose weights are W0 + s B A, multiplied out here."""
    value = adapters.adapter("it")
    adapters.deactivate()
    copied = copy.deepcopy(model)
    adapters.activate("it")
    with torch.no_grad():
        for name, weights in value.layers.items():
            whole, weight = weights.as_one_pair(), copied.get_submodule(name).weight
            weight += weights.scale * (whole.lora_B.flatten(1) @ whole.lora_A.flatten(1)).view(weight.shape)
    return copied


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_is_alive_and_acts_as_its_weight_multiplied_out(name):
    _, run, words = MODELS[name]
    model = built(name)
    with torch.no_grad():
        before = run(model)
    adapters = adapted(model, find_targets(model, words))
    prove_alive(model, lambda: run(model))
    with torch.no_grad():
        after, reference = run(model), run(by_hand(model, adapters))
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["q", "k", "v", "o", "mlp", "proj", "conv"])
def test_every_word_finds_layers_of_its_own(word):
    model = tiny.unet()
    all_words = ["q", "k", "v", "o", "mlp", "proj", "conv"]
    own = names(find_targets(model, [word]))
    others = names(find_targets(model, [w for w in all_words if w != word]))
    assert own
    assert not set(own) & set(others)
    assert sorted(own + others) == sorted(names(find_targets(model, all_words)))


def test_words_mean_the_layers_that_diffusers_calls_so():
    ends = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    model = tiny.unet()
    for word, end in ends.items():
        found = names(find_targets(model, [word]))
        assert found == [name for name, _ in model.named_modules() if name.endswith(end)]
    assert names(find_targets(model, ["qkv"])) == names(find_targets(model, ["q", "k", "v"]))


def test_self_and_cross_attention_are_chosen_apart():
    model = tiny.unet()
    both = names(find_targets(model, ["q", "o"]))
    apart = [names(find_targets(model, ["q", "o"], attention=[kind])) for kind in ("self", "cross")]
    assert all(".attn1." in name for name in apart[0])
    assert all(".attn2." in name for name in apart[1])
    assert sorted(both) == sorted(apart[0] + apart[1])


def test_temporal_attention_of_motion_modules_is_self_attention():
    found = names(find_targets(built("UNetMotionModel"), ["q"], attention=["self"]))
    assert any("motion_modules" in name and name.endswith("attn2.to_q") for name in found)
    assert not any(
        "motion_modules" in name for name in names(find_targets(built("UNetMotionModel"), ["q"], attention=["cross"]))
    )


def test_cross_attention_of_classes_that_dont_say_so_is_told_by_its_name():
    block = Kandinsky5TransformerDecoderBlock(model_dim=8, time_dim=8, ff_dim=16, head_dim=4)
    for kind, name in (("self", "self_attention"), ("cross", "cross_attention")):
        assert names(find_targets(nn.Sequential(block), ["q"], attention=[kind])) == [f"0.{name}.to_query"]


@pytest.mark.skipif(not hasattr(diffusers, "LTX2VideoTransformer3DModel"), reason="diffusers has none yet")
def test_attention_between_picture_and_sound_and_to_the_sounds_text_is_cross_attention():
    with torch.device("meta"):
        model = diffusers.LTX2VideoTransformer3DModel(num_layers=1)
    kinds = {
        kind: {n.split(".")[2] for n in names(find_targets(model, ["k"], "transformer_blocks.0", [kind]))}
        for kind in ("self", "cross")
    }
    assert kinds["self"] == {"attn1", "audio_attn1"}
    assert kinds["cross"] == {"attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"}


def test_kandinsky_3_looks_at_the_picture_in_those_that_have_no_context():
    with torch.device("meta"):
        model = diffusers.Kandinsky3UNet()
    model.add_time_condition = None  # pools the text
    widths = {name: model.get_submodule(name).in_features for name in names(find_targets(model, ["q", "k"]))}
    for kind in ("self", "cross"):
        for name in names(find_targets(model, ["k"], attention=[kind])):
            assert (widths[name] == widths[name.replace("to_k", "to_q")]) == (kind == "self"), name


@pytest.mark.skipif(not hasattr(diffusers, "NucleusMoEImageTransformer2DModel"), reason="diffusers has none yet")
def test_experts_that_are_no_layers_are_refused_where_the_mlp_is_asked_for():
    with torch.device("meta"):
        model = diffusers.NucleusMoEImageTransformer2DModel(num_layers=5)
    assert find_targets(model, ["q"])
    with pytest.raises(AdapterError, match="holds feed-forward layers of a family without targets yet: SwiGLUExperts"):
        find_targets(model, ["mlp"])


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("q", lambda: HunyuanDiTAttentionPool(4, 8, 2)),  # reads the weights of its layers
        ("q", lambda: MochiAttentionPool(2, 8)),
        ("mlp", lambda: HunyuanImageByT5TextProjection(8, 8, 8)),
    ],
    ids=["pooling", "Mochi's", "projection"],
)
def test_what_makes_the_text_ready_is_no_part_of_the_blocks(word, part):
    unet = tiny.unet()
    assert names(find_targets(nn.Sequential(part(), unet), [word])) == [
        f"1.{n}" for n in names(find_targets(unet, [word]))
    ]


def test_joint_attention_takes_the_texts_own_projections_too():
    found = names(find_targets(built("SD3Transformer2DModel"), ["q", "o"]))
    first, last = "transformer_blocks.0.attn", "transformer_blocks.1.attn"
    assert found == [
        f"{first}.to_q",
        f"{first}.add_q_proj",
        f"{first}.to_out.0",
        f"{first}.to_add_out",
        *(
            # the last block throws away what the text would attend to
            [f"{last}.to_q", f"{last}.to_out.0"]
        ),
    ]


def test_projections_that_lie_beside_an_mlp_are_one_pair_without_its_rows():
    model = MODELS["Flux2Transformer2DModel"][0]()
    beside = [target for target in find_targets(model, ["qkv"]) if "mlp" in target.name]
    assert [target.rows for target in beside] == [((0, 96),)] * 2
    for i, word in enumerate("qkv"):
        of_one = [target.rows for target in find_targets(model, [word]) if "mlp" in target.name]
        assert of_one == [((32 * i, 32 * i + 32),)] * 2
    mlps = [target for target in find_targets(model, ["mlp"]) if target.name in {b.name for b in beside}]
    assert [target.rows[0][0] for target in mlps] == [96, 96]


def test_output_of_single_stream_blocks_is_the_blocks_own_projection():
    found = names(find_targets(built("FluxTransformer2DModel"), ["o"]))
    assert found[-2:] == ["single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out"]


# --- After fuse_qkv_projections ---------------------------------------------------------------------------------------

FUSED = ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]


def fused(name: str) -> nn.Module:
    model = built(name)
    model.fuse_qkv_projections()
    return model


@pytest.mark.parametrize("words", [("q", "v"), ("k",), ("q", "k", "v", "o"), ("qkv", "o")], ids=",".join)
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_alive_and_act_as_their_weights_multiplied_out(name, words):
    run, model = MODELS[name][1], fused(name)
    adapters = adapted(model, find_targets(model, words))
    prove_alive(model, lambda: run(model))
    with torch.no_grad():
        assert torch.allclose(run(model), run(by_hand(model, adapters)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("word", ["q", "k", "v"])
@pytest.mark.parametrize("name", FUSED)
def test_pair_of_a_fused_projection_writes_the_rows_that_diffusers_stacked_from_it(name, word):
    model = fused(name)
    for target in find_targets(model, [word]):
        parent, _, last = target.name.rpartition(".")
        attention, (rows,) = model.get_submodule(parent), target.rows or (None,)
        if rows is None:  # q of cross attention stays a layer of its own
            assert last == "to_q"
            continue
        part = f"add_{word}_proj" if last == "to_added_qkv" else f"to_{word}"
        assert torch.equal(attention.get_submodule(last).weight[slice(*rows)], attention.get_submodule(part).weight)


def test_nothing_fused_is_left_unused():
    model = fused("UNet2DConditionModel")
    found = names(find_targets(model, ["q", "k", "v"]))
    assert {name.rpartition(".")[2] for name in found} == {"to_qkv", "to_kv", "to_q"}
    assert all(".attn2." in name for name in found if name.endswith("to_q"))
    model.unfuse_qkv_projections()
    assert {n.rpartition(".")[2] for n in names(find_targets(model, ["q", "k", "v"]))} == {"to_q", "to_k", "to_v"}


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([0], ["down_blocks.0.attentions.0.transformer_blocks.0"]),
        ([-1], ["up_blocks.1.attentions.1.transformer_blocks.0"]),
        (["mid_block"], ["mid_block.attentions.0.transformer_blocks.0"]),
        (["up_blocks.1", 0], ["down_blocks.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        ("last:2", ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        (["0-1"], ["down_blocks.0", "mid_block"]),
        ("down_.*", ["down_blocks.0"]),
        ([], []),
    ],
)
def test_blocks_are_chosen_by_index_and_by_name(blocks, found):
    chosen = names(find_targets(tiny.unet(), ["q", "mlp"], blocks))
    assert len(chosen) == 4 * len(found)
    assert {start for name in chosen for start in found if name.startswith(f"{start}.")} == set(found)


def test_a_block_that_isnt_there_is_refused():
    with pytest.raises(AdapterError, match="block 7 isn't there; the model has 4"):
        find_targets(tiny.unet(), ["q"], 7)


def test_convolutions_are_chosen_by_name():
    assert all(name.startswith("up_blocks.0.") for name in names(find_targets(tiny.unet(), ["conv"], ["up_blocks.0"])))
    with pytest.raises(AdapterError, match="blocks=0 is no module of UNet2DConditionModel, and proj and conv"):
        find_targets(tiny.unet(), ["conv"], [0])


def test_block_of_a_name_takes_no_other_that_begins_alike():
    model = nn.ModuleDict({f"blocks{i}": tiny.unet() for i in ("", "1")})
    assert all(name.startswith("blocks.") for name in names(find_targets(model, ["q"], ["blocks"])))


@pytest.mark.parametrize("model", [tiny.clip, tiny.t5])
def test_block_of_a_text_encoder_holds_its_feed_forward_layers(model):
    first, last = (names(find_targets(model(), ["q", "mlp"], [i])) for i in (0, -1))
    assert len(first) == len(last) >= 3
    assert not set(first) & set(last)


@pytest.mark.parametrize("block", [4, -5])
def test_block_index_out_of_range_is_named(block):
    with pytest.raises(AdapterError, match=rf"block {block} isn't there; the model has 4, 0 to 3 or -4 to -1"):
        find_targets(tiny.unet(), ["q"], [block])


def test_each_attention_of_a_list_is_a_block_of_its_own():
    model = built("UNet2DModel")
    assert names(find_targets(model, ["q"], "last:2")) == [f"up_blocks.0.attentions.{i}.to_q" for i in (0, 1)]
    assert names(find_targets(model, ["q"], -1)) == ["up_blocks.0.attentions.1.to_q"]


def test_block_name_that_is_not_there_is_named():
    with pytest.raises(AdapterError, match=r"blocks=up_block matches none of the blocks down_blocks\.0\."):
        find_targets(tiny.unet(), ["q"], ["up_block"])


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "attention", "message"),
    [
        (["q", "keys"], ["self"], "unknown projections keys; choose from qkv, q, k, v, o, mlp, proj, conv"),
        ([], ["self"], "no projections to adapt"),
        (["q"], ["temporal"], "unknown attention temporal; choose from self, cross"),
        (["qkv", "q"], ["self"], "either qkv as a whole or its parts"),
        (["proj", "mlp"], ["cross"], "attention=cross chooses among the layers of attention, and only mlp, proj is to"),
    ],
)
def test_words_that_make_no_sense_are_refused(words, attention, message):
    with pytest.raises(AdapterError, match=message):
        find_targets(tiny.unet(), words, attention=attention)


@pytest.mark.parametrize(
    ("model", "words", "attention", "message"),
    [
        (tiny.clip, ["q", "conv"], ["self"], "CLIPTextModel has no conv layers there"),
        (tiny.clip, ["q"], ["cross"], r"CLIPTextModel has no q layers there \(cross attention\)"),
        (lambda: built("SanaTransformer2DModel"), ["mlp"], ["self", "cross"], "SanaTransformer2DModel has no mlp"),
        # whose own proj_out makes the prediction
        (lambda: built("SD3Transformer2DModel"), ["proj"], ["self", "cross"], "SD3Transformer2DModel has no proj"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ["q"], ["self"], "Sequential holds no attention to adapt"),
    ],
)
def test_projection_that_the_model_lacks_is_refused(model, words, attention, message):
    with pytest.raises(AdapterError, match=message):
        find_targets(model(), words, attention=attention)


def test_attention_that_reads_its_weights_past_the_layers_is_refused_by_name():
    with pytest.raises(AdapterError, match=r"Sequential holds attention of a family .*: MultiheadAttention"):
        find_targets(nn.Sequential(tiny.unet(), nn.MultiheadAttention(16, 2)), ["q"])


def test_attention_and_feed_forward_layers_of_unknown_names_are_refused_by_class():
    class OddAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Linear(4, 4)

    class OddFeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

    with pytest.raises(AdapterError, match=r"attention of a family without targets yet: .*OddAttention"):
        find_targets(nn.Sequential(tiny.unet(), OddAttention()), ["q"])
    model = nn.Sequential(tiny.unet(), OddFeedForward())
    with pytest.raises(AdapterError, match=r"feed-forward layers of a family without .*OddFeedForward"):
        find_targets(model, ["mlp"])
    assert find_targets(model, ["q"])
