"""kohya's file as a ComfyUI-like reader takes it, as its own trainer writes it, and what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.formats.kohya import read_kohya, write_kohya
from vislora.lora import Adapter, LowRankWeights


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> diffusers.StableDiffusionXLPipeline:
    return tiny.stable_diffusion_xl(tmp_path_factory.mktemp("sdxl"))


def comfy(file: Path, pipe: diffusers.DiffusionPipeline) -> dict[str, Tensor]:
    """The update of each layer by ComfyUI's rule, written from its documentation of keys: every layer of the model is
    asked for under the names it may have; up @ down * alpha / rank, 1 without an alpha. Leftover keys are an error."""
    tensors, found = load_file(file), {}
    for component, prefixes in {
        "unet": ["lora_unet_"],
        "text_encoder": ["lora_te_", "lora_te1_"],
    }.items():
        for name, module in getattr(pipe, component).named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            named = tiny.in_files(f"{component}.{name}").partition(".")[2].replace(".", "_")
            for key in [prefix + named for prefix in prefixes]:
                if f"{key}.lora_up.weight" in tensors:
                    up, down = (tensors.pop(f"{key}.lora_{way}.weight") for way in ("up", "down"))
                    alpha = tensors.pop(f"{key}.alpha", torch.tensor(float(down.shape[0]))).item()
                    product = up.flatten(1) @ down.flatten(1)
                    found[f"{component}.{name}"] = product.view(module.weight.shape) * (alpha / down.shape[0])
    assert not tensors, f"keys that were not loaded: {list(tensors)}"
    return found


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"pick": lambda name: True},
        {"rank": lambda name: 2 + len(name) % 3, "alpha": lambda name: 0.5 + len(name) % 4},
    ],
    ids=["attention", "every layer", "mixed ranks and alphas"],
)
def test_comfyui_gets_the_same_update_in_every_layer(sd, tmp_path, choices):
    adapter = tiny.trained(sd, **choices)
    found = comfy(write_kohya(adapter, tmp_path / "style.safetensors"), sd)
    assert found.keys() == adapter.layers.keys()
    for name, weights in adapter.layers.items():
        assert torch.allclose(found[name].flatten(1), tiny.delta(weights), rtol=1e-5, atol=1e-7), name


def test_rslora_becomes_an_alpha_that_gives_the_same_scale(sd, tmp_path):
    adapter = tiny.trained(sd)
    stabilised = Adapter({name: replace(w, rslora=True) for name, w in adapter.layers.items()})
    found = comfy(write_kohya(stabilised, tmp_path / "style.safetensors"), sd)
    for name, weights in stabilised.layers.items():
        assert torch.allclose(found[name].flatten(1), tiny.delta(weights), rtol=1e-5, atol=1e-7), name


def test_dora_has_a_length_for_each_output_row_as_comfyui_reads_it(sd, tmp_path):
    adapter = tiny.trained(sd, lambda name: name.endswith(("to_q", "conv1")), components=["unet"], dora=True)
    file = write_kohya(adapter, tmp_path / "style.safetensors")
    tensors = load_file(file)
    for name, weights in adapter.layers.items():
        layer = sd.unet.get_submodule(name.removeprefix("unet."))
        scale = tensors["lora_" + name.replace(".", "_") + ".dora_scale"]
        adapted = layer.weight.detach() + tiny.delta(weights).view(layer.weight.shape)
        lengths = adapted.flatten(1).norm(dim=1).view(-1, *[1] * (adapted.dim() - 1))
        assert scale.shape == lengths.shape
        assert torch.allclose((adapted * scale / lengths).flatten(1).norm(dim=1), weights.magnitude.abs(), rtol=1e-4)
    back = read_kohya(file).layers
    assert all(torch.equal(back[name].magnitude, weights.magnitude) for name, weights in adapter.layers.items())


def test_dora_of_input_columns_is_refused(tmp_path):
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 8), f"{KEY}.lora_up.weight": torch.ones(8, 2)}
    for lengths, message in (
        (torch.ones(1, 8), "is for input"),
        (torch.ones(7, 1), r"shape \[7, 1\]"),
        (torch.ones(()), "shape"),
    ):
        save_file(tensors | {f"{KEY}.dora_scale": lengths}, tmp_path / "odd.safetensors")
        with pytest.raises(AdapterError, match=message):
            read_kohya(tmp_path / "odd.safetensors")


def test_one_alpha_for_all_since_diffusers_reads_only_one(sd, tmp_path):
    adapter = tiny.trained(sd, rank=lambda name: 2 + len(name) % 3, alpha=lambda name: 1.0 + len(name) % 4)
    tensors = load_file(write_kohya(adapter, tmp_path / "style.safetensors"))
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}) == 1


def test_layer_of_alpha_0_stays_off_beside_others(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    off, on = (LowRankWeights(torch.ones(2, 8), torch.ones(8, 2), 2, alpha, 8) for alpha in (0.0, 4.0))
    back = read_kohya(write_kohya(Adapter({f"{name}.to_q": off, f"{name}.to_k": on}), tmp_path / "a.safetensors"))
    assert not tiny.delta(back.layers[f"{name}.to_q"]).any()
    assert torch.equal(tiny.delta(back.layers[f"{name}.to_k"]), torch.full((8, 8), 4.0))


def test_equal_alphas_leave_the_matrices_bit_for_bit(sd, tmp_path):
    adapter = tiny.trained(sd)
    back = read_kohya(write_kohya(adapter, tmp_path / "style.safetensors"))
    for name, weights in adapter.layers.items():
        other = back.layers[tiny.in_files(name)]
        assert torch.equal(weights.lora_A, other.lora_A)
        assert torch.equal(weights.lora_B, other.lora_B)
        assert weights.alpha == other.alpha


@pytest.mark.parametrize("choices", [{}, {"pick": lambda name: True}], ids=["attention", "every layer"])
def test_sdxl_reads_back_and_is_named_as_the_trainers_name_it(sdxl, tmp_path, choices):
    adapter = tiny.trained(sdxl, **choices)
    file = write_kohya(adapter, tmp_path / "style.safetensors")
    prefixes = {key.partition("_text_model")[0] for key in load_file(file) if "_te" in key.partition(".")[0][:8]}
    assert prefixes >= {"lora_te1", "lora_te2"}
    assert not any("down_blocks" in key or "up_blocks" in key for key in load_file(file))
    back = read_kohya(file).layers
    for name, weights in adapter.layers.items():
        assert torch.equal(weights.lora_A, back[tiny.in_files(name)].lora_A)


def test_header_says_what_other_programs_ask_for(sd, sdxl, tmp_path):
    file = write_kohya(tiny.trained(sd), tmp_path / "style.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "6.0")
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["ss_v2"] == "False"
    raw = file.read_bytes()
    assert header["sshs_model_hash"] == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    with safe_open(write_kohya(tiny.trained(sdxl), tmp_path / "xl.safetensors"), "pt") as opened:
        assert opened.metadata()["ss_base_model_version"].startswith("sdxl_")


@pytest.mark.parametrize(
    ("width", "version", "key"),
    [
        (768, "sd_v1", "lora_unet_down_blocks_1_attentions_0_"),
        (1024, "sd_v2", "lora_unet_down_blocks_1_attentions_0_"),
        (2048, "sdxl_base_v1-0", "lora_unet_input_blocks_4_1_"),
    ],
)
def test_model_is_told_by_the_width_of_its_text(tmp_path, width, version, key):
    weights = LowRankWeights(torch.ones(2, width), torch.ones(8, 2), 2, 2.0, 8)
    adapter = Adapter({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": weights})
    file = write_kohya(adapter, tmp_path / "style.safetensors")
    with safe_open(file, "pt") as opened:
        header, keys = opened.metadata(), list(opened.keys())
    assert header["ss_base_model_version"] == version
    assert header["ss_v2"] == str(width == 1024)
    assert all(name.startswith(f"{key}transformer_blocks_0_attn2_to_k.") for name in keys)


@pytest.mark.parametrize(
    ("channels", "version", "key"),
    [
        (640, "sd_v1", "lora_unet_up_blocks_2_resnets_0_conv2"),
        (320, "sdxl_base_v1-0", "lora_unet_output_blocks_6_0_out_l"),
    ],
)
def test_model_is_told_by_the_width_of_its_residual_blocks(tmp_path, channels, version, key):
    weights = LowRankWeights(torch.ones(2, channels, 3, 3), torch.ones(channels, 2, 1, 1), 2, 2.0, channels)
    file = write_kohya(Adapter({"unet.up_blocks.2.resnets.0.conv2": weights}), tmp_path / "style.safetensors")
    with safe_open(file, "pt") as opened:
        header, keys = opened.metadata(), list(opened.keys())
    assert header["ss_base_model_version"] == version
    assert all(name.startswith(key) for name in keys)


@pytest.mark.parametrize(
    ("components", "ends", "prefixes"),
    [
        (("unet",), "attn1.to_q", {"lora_unet_input", "lora_unet_middle", "lora_unet_output"}),
        (("text_encoder", "text_encoder_2"), "q_proj", {"lora_te1_text", "lora_te2_text"}),
        (("unet",), "add_embedding.linear_1", {"lora_unet_label"}),
    ],
    ids=["deep blocks", "second text encoder", "embedding of sizes"],
)
def test_sdxl_is_told_by_what_only_it_has_where_no_layer_reads_text(sdxl, tmp_path, components, ends, prefixes):
    adapter = tiny.trained(sdxl, lambda name: name.endswith(ends), components=components)
    keys = load_file(write_kohya(adapter, tmp_path / "style.safetensors"))
    assert {"_".join(key.split("_")[:3]) for key in keys} == prefixes


def test_convolutions_are_told_in_the_header(sd, tmp_path):
    adapter = tiny.trained(sd, lambda name: name.endswith(("to_q", "conv1")))
    with safe_open(write_kohya(adapter, tmp_path / "style.safetensors"), "pt") as opened:
        assert json.loads(opened.metadata()["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "6.0"}


def test_file_goes_into_a_folder_under_its_name_and_keeps_what_travels_with_it(sd, tmp_path):
    adapter = replace(tiny.trained(sd), about={"model": {"name": "embedded"}})
    file = write_kohya(adapter, tmp_path / "style")
    assert file == tmp_path / "style" / "style.safetensors"
    assert read_kohya(file).about == adapter.about


# --- Written by kohya's trainer ---------------------------------------------------------------------------------------


def test_file_of_the_trainer_reads_with_its_scales(tmp_path):
    a, b = torch.randn(4, 8), torch.randn(8, 4)
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{unet}_attn1_to_q.lora_down.weight": a.half(),
        f"{unet}_attn1_to_q.lora_up.weight": b.half(),
        f"{unet}_attn1_to_q.alpha": torch.tensor(1.0).half(),
        f"{unet}_ff_net_0_proj.lora_down.weight": a.clone(),
        f"{unet}_ff_net_0_proj.lora_up.weight": b.clone(),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": a.clone()[:, :, None, None],
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": b.clone()[:, :, None, None],
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(8),
        f"{text}.lora_down.weight": a.clone(),
        f"{text}.lora_up.weight": b.clone(),
        f"{text}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "kohya.safetensors", {"ss_network_dim": "4"})
    layers = read_kohya(tmp_path / "kohya.safetensors").layers
    block = "unet.mid_block.attentions.0"
    assert {name: weights.scale for name, weights in layers.items()} == {
        f"{block}.transformer_blocks.0.attn1.to_q": 0.25,
        f"{block}.transformer_blocks.0.ff.net.0.proj": 1.0,
        f"{block}.proj_in": 2.0,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 0.5,
    }
    assert torch.equal(layers[f"{block}.transformer_blocks.0.attn1.to_q"].lora_A, a.half().float())


# --- Refused ----------------------------------------------------------------------------------------------------------

KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{KEY}.hada_w1_a", "LoHa can't be read"),
        (f"{KEY}.lokr_w2", "LoKr can't be read"),
        (f"{KEY}.lora_mid.weight", "LoCon's Tucker decomposition can't be read"),
        (f"{KEY}.diff", "a weight changed in full can't be read"),
        (f"{KEY}.diff_b", "a changed bias can't be read"),
        (f"{KEY}.w_norm", "a trained norm can't be read"),
        (f"{KEY}.oft_blocks", "OFT can't be read"),
        (f"{KEY}.surprise", "its meaning isn't known"),
    ],
)
def test_key_that_would_be_lost_is_named(tmp_path, key, what):
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 8), f"{KEY}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors | {key: torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=f"'{key}': {what}; it would be lost"):
        read_kohya(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "others",
    [
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", KEY),
        tuple(f"{start}_text_model_encoder_layers_0_mlp_fc1" for start in ("lora_te", "lora_te1")),
    ],
    ids=["sgm's names", "text encoders"],
)
def test_layer_under_two_names_is_refused(tmp_path, others):
    ends = {".lora_down.weight": (2, 8), ".lora_up.weight": (8, 2)}
    save_file(
        {f"{o}{end}": torch.ones(shape) for o in others for end, shape in ends.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterError, match="a second time"):
        read_kohya(tmp_path / "a.safetensors")


def test_layer_of_another_model_is_named_with_the_models_there_are(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(AdapterError, match=r"double_blocks_0.*; in this format Stable Diffusion 1, 2 and XL can be"):
        read_kohya(tmp_path / "flux.safetensors")


def test_transformers_cannot_be_written(tmp_path):
    pipe = tiny.trained
    weights = next(iter(pipe(tiny.stable_diffusion(tmp_path)).layers.values()))
    with pytest.raises(AdapterError, match="none for transformer; write the adapter as diffusers' file"):
        write_kohya(Adapter({"transformer.transformer_blocks.0.attn.to_q": weights}), tmp_path / "x.safetensors")


def test_modules_trained_in_full_cannot_be_written(sd, tmp_path):
    adapter = replace(tiny.trained(sd), trained={"unet.conv_in": {"weight": torch.ones(1)}})
    with pytest.raises(AdapterError, match=r"no place for modules trained in full: unet.conv_in"):
        write_kohya(adapter, tmp_path)
