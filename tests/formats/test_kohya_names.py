"""kohya's names, made independently: from the layers of the real model classes by the rules of the trainers."""

import diffusers
import pytest
import torch
from torch import nn

from vislora.errors import AdapterError
from vislora.formats.kohya_names import from_kohya, numbered_as_sdxl, to_kohya


def empty_unet(**config) -> nn.Module:
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config)


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    return empty_unet(cross_attention_dim=768)


@pytest.fixture(scope="module")
def sdxl() -> nn.Module:
    return empty_unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def test_every_layer_of_sd15_is_named_by_its_path_with_underscores(sd15):
    names = layers(sd15)
    assert len(names) > 250
    for name in names:
        assert to_kohya(f"unet.{name}", sdxl=False) == "lora_unet_" + name.replace(".", "_")
        assert from_kohya("lora_unet_" + name.replace(".", "_")) == f"unet.{name}"


def sgm_names(unet: nn.Module) -> dict[str, str]:
    """sgm's name of every layer: its blocks are counted along the network, as its constructor appends them."""
    found = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_out": "out.2",
    }
    inside = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    inside["conv_shortcut"] = "skip_connection"

    def block(sgm: str, path: str, resnet: nn.Module, attention: nn.Module | None, index: int) -> None:
        own = {name for name, module in resnet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        found.update({f"{path}.resnets.{index}.{name}": f"{sgm}.0.{inside[name]}" for name in own})
        for name in layers(attention) if attention is not None else []:
            found[f"{path}.attentions.{index}.{name}"] = f"{sgm}.1.{name}"

    count = 1
    for i, down in enumerate(unet.down_blocks):
        for j, resnet in enumerate(down.resnets):
            attention = down.attentions[j] if hasattr(down, "attentions") else None
            block(f"input_blocks.{count}", f"down_blocks.{i}", resnet, attention, j)
            count += 1
        if down.downsamplers is not None:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    for j, place in enumerate((0, 2)):
        for name, theirs in inside.items():
            found[f"mid_block.resnets.{j}.{name}"] = f"middle_block.{place}.{theirs}"
    for name in layers(unet.mid_block.attentions[0]):
        found[f"mid_block.attentions.0.{name}"] = f"middle_block.1.{name}"
    count = 0
    for i, up in enumerate(unet.up_blocks):
        for j, resnet in enumerate(up.resnets):
            attention = up.attentions[j] if hasattr(up, "attentions") else None
            block(f"output_blocks.{count}", f"up_blocks.{i}", resnet, attention, j)
            count += 1
        if up.upsamplers is not None:  # appended to the last of the level's blocks, behind its attention
            found[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.2.conv"
    return {name: found[name] for name in layers(unet)}


def test_every_layer_of_sdxl_has_the_name_that_counting_its_blocks_gives(sdxl):
    names = sgm_names(sdxl)
    assert len(names) > 700
    for name, sgm in names.items():
        assert to_kohya(f"unet.{name}", sdxl=True) == "lora_unet_" + sgm.replace(".", "_")
        assert from_kohya("lora_unet_" + sgm.replace(".", "_")) == f"unet.{name}"


def test_sgms_numbers_fit_sdxl_and_parts_of_it(sdxl):
    names = [f"unet.{name}" for name in sgm_names(sdxl)]
    assert numbered_as_sdxl(names)
    assert numbered_as_sdxl([name for name in names if "up_blocks.0.attentions." in name and ".2." not in name])
    assert numbered_as_sdxl(["unet.down_blocks.1.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.fc1"])


def test_the_example_that_the_trainers_documents_give():
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert to_kohya(name, sdxl=True) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize(
    ("component", "prefixes"),
    [("text_encoder", ("lora_te", "lora_te1")), ("text_encoder_2", ("lora_te2", "lora_te2"))],
)
@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"])
def test_text_encoders_have_a_prefix_each(component, prefixes, module):
    name = f"{component}.text_model.encoder.layers.11.{module}"
    for sdxl, prefix in zip((False, True), prefixes, strict=True):
        flat = f"{prefix}_text_model_encoder_layers_11_{module.replace('.', '_')}"
        assert to_kohya(name, sdxl) == flat
        assert from_kohya(flat) == name


def test_sd15_in_the_names_of_its_original_code_is_read_too():
    assert from_kohya("lora_unet_output_blocks_2_1_conv") == "unet.up_blocks.0.upsamplers.0.conv"
    assert from_kohya("lora_unet_input_blocks_1_1_proj_in") == "unet.down_blocks.0.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks_0_img_attn_qkv has a part .*: double_blocks_0"),
        ("lora_unet_down_blocks_0_odd_1", "has a part that Stable Diffusion doesn't have: odd_1"),
        ("lora_unet_input_blocks_x", "has a part"),
        ("lora_te3_encoder_block_0", "begins with none of lora_unet, lora_te, lora_te1, lora_te2"),
    ],
)
def test_names_of_other_models_are_refused(name, message):
    with pytest.raises(AdapterError, match=message):
        from_kohya(name)


def test_components_without_kohya_names_are_refused():
    with pytest.raises(AdapterError, match=r"transformer.transformer_blocks.0.attn.to_q: .* none for transformer"):
        to_kohya("transformer.transformer_blocks.0.attn.to_q", sdxl=False)


def test_layers_that_sdxl_does_not_have_are_refused():
    with pytest.raises(AdapterError, match="SDXL's UNet has no layer of this name"):
        to_kohya("unet.class_embedding.linear_1", sdxl=True)
