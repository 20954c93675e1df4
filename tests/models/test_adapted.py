"""Text encoders are adapted wherever the pipeline makes use of them and diffusers would, and nowhere else."""

from dataclasses import asdict

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
import transformers
from torch import nn

import vislora
from vislora.config.adapter import Bias, LoraAdapter, PipelineLora
from vislora.errors import AdapterError
from vislora.formats.detect import read_adapter
from vislora.formats.diffusers import write_diffusers
from vislora.formats.kohya import write_kohya
from vislora.lora import Adapter
from vislora.models.adapted import adapt_pipeline, lora_settings
from vislora.models.denoiser import text_encoders

PIPELINES = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
    "flux": tiny.flux,
}
PROJECTIONS = ("_proj", ".q", ".k", ".v", ".o")


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_the_layers_adapted_are_those_that_move_what_the_pipeline_encodes(build, tmp_path):
    pipe = build(tmp_path / "words")
    weights = {
        f"{encoder}.{name}": layer.weight
        for encoder in text_encoders(pipe)
        if isinstance(getattr(pipe, encoder), transformers.CLIPPreTrainedModel)
        for name, layer in getattr(pipe, encoder).named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(PROJECTIONS)
    }
    guided = {} if isinstance(pipe, diffusers.FluxPipeline) else {"do_classifier_free_guidance": False}
    more = {f"prompt_{i}": "two" for i in (2, 3) if hasattr(pipe, f"tokenizer_{i}")}
    found = pipe.encode_prompt(prompt="a bird", device="cpu", num_images_per_prompt=1, **more, **guided)
    moved = sum((tensor * torch.randn_like(tensor)).sum() for tensor in found if tensor is not None)
    grads = torch.autograd.grad(moved, list(weights.values()), allow_unused=True)
    read = {name for name, grad in zip(weights, grads, strict=True) if grad is not None and grad.any()}
    layers = adapt_pipeline(pipe, PipelineLora(rank=2, text_encoder=True)).adapter("default").layers
    assert {name for name in layers if name.startswith("text_encoder")} == read


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_diffusers_draws_all_that_was_learned_with_text_encoders(build, tmp_path):
    pytest.importorskip("peft")
    mine, peer = build(tmp_path / "words"), build(tmp_path / "words")
    adapters = adapt_pipeline(mine, PipelineLora(rank=2, text_encoder=True))
    for name, parameter in adapters.model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
    file = write_diffusers(adapters.adapter("default"), tmp_path)
    adapters.remove("default")
    vislora.apply(mine, file)
    peer.load_lora_weights(str(file))
    torch.testing.assert_close(tiny.draw(mine), tiny.draw(peer), rtol=0, atol=1 / 255)


def test_an_adapter_to_go_on_from_gets_the_dropout_that_is_set(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    file = write_diffusers(adapt_pipeline(pipe, PipelineLora(rank=2, dropout=0.1)).adapter("default"), tmp_path)
    pipe = tiny.stable_diffusion(tmp_path / "words")
    adapters = adapt_pipeline(pipe, PipelineLora(dropout=0.3, start=str(file)), read_adapter(file, type(pipe)))
    assert adapters.adapter("default").dropout == 0.3


def test_an_adapter_to_go_on_from_that_could_not_be_written_is_refused(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    kept = tiny.trained(pipe, components=["unet"]).layers
    mixed = kept | tiny.trained(pipe, lambda name: "conv1" in name, components=["unet"], dora=True).layers
    file = write_kohya(Adapter(mixed), tmp_path / "mixed.safetensors")
    with pytest.raises(AdapterError, match=r"mixed\.safetensors: diffusers can't hold layers with and without DoRA in"):
        adapt_pipeline(pipe, PipelineLora(start=str(file)), read_adapter(file, type(pipe)))


def test_adapter_that_cannot_move_the_prediction_is_refused_before_training(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    pipe.unet.get_submodule(block).set_processor(lambda attention, x, *_, **__: x)
    with pytest.raises(AdapterError, match=rf"can't move the output: unet\.{block}\.to_q"):
        adapt_pipeline(pipe, PipelineLora(rank=2))


@pytest.mark.parametrize(
    "config",
    [
        LoraAdapter(rank=3, alpha=5.0, dropout=0.1, rslora=True, bias=Bias.all),
        LoraAdapter(dora=True, rank_pattern={"qkv": 2}, alpha_pattern={"proj": 7.0}),
        LoraAdapter(pissa=True, bias=Bias.lora_only),
    ],
)
def test_every_setting_of_an_adapter_reaches_the_core(config):
    settings = asdict(lora_settings(config))
    assert settings == {key: getattr(config, key) for key in settings} | {"bias": config.bias.value}
