"""Adapters put into a diffusion pipeline, and proven to act."""

from typing import Any

import torch
from torch import Tensor

from vislora.config import LoraAdapter, PipelineLora
from vislora.lora import Adapters, LoraSettings, TargetLayer, prove_alive
from vislora.models.denoiser import Denoiser, text_encoders, tokenize
from vislora.targets.diffusers import find_targets


def adapt_pipeline(pipe: Any, config: PipelineLora) -> Adapters:
    """Freeze a pipeline and put adapters into its UNet and, if wanted, its text encoders; prove that each one acts.

    Returns:
        the adapters, holding one named "default", its layers named by component: `unet.mid_block.…`.

    Raises:
        AdapterError: targets that aren't there, or that can't move the prediction.
    """
    model = Denoiser(pipe, config.text_encoder)
    words = [target.value for target in config.targets]
    found = find_targets(pipe.unet, words, _blocks(config), [kind.value for kind in config.attention])
    targets = [TargetLayer(f"unet.{target.name}", target.rows) for target in found]
    for name in text_encoders(pipe) if config.text_encoder else ():
        chosen = find_targets(getattr(pipe, name), ["qkv", "o"])
        targets += [TargetLayer(f"{name}.{target.name}", target.rows) for target in chosen]
    adapters = Adapters(model)
    adapters.add("default", targets, lora_settings(config))
    prove_alive(model, lambda: _example(model, pipe, config.text_encoder))
    return adapters


def lora_settings(config: LoraAdapter) -> LoraSettings:
    """What the core makes of an adapter's settings."""
    return LoraSettings(
        config.rank,
        config.alpha,
        config.dropout,
        config.rslora,
        config.dora,
        config.pissa,
        config.bias.value,
        config.rank_pattern,
        config.alpha_pattern,
    )


def _blocks(config: PipelineLora) -> list[int | str] | None:
    if config.blocks is None:
        return None
    return [int(block) if block.lstrip("-").isdigit() else block for block in config.blocks]


def _example(model: Denoiser, pipe: Any, text_encoder: bool) -> Tensor:
    """The prediction for two small noises and two captions."""
    unet = pipe.unet.config
    weight = next(pipe.unet.parameters())
    side = 2 ** (len(unet.block_out_channels) - 1) * 2
    latents = torch.randn(2, unet.in_channels, side, side, dtype=weight.dtype, device=weight.device)
    if text_encoder:
        text = {name: rows.to(weight.device) for name, rows in tokenize(pipe, ["a bird", "two"]).items()}
    else:
        text = {"prompt_embeds": torch.randn(2, 8, unet.cross_attention_dim).to(weight)}
        if unet.addition_embed_type == "text_time":
            pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            text["pooled_prompt_embeds"] = torch.randn(2, pooled).to(weight)
    text["time_ids"] = torch.full((2, 6), 64.0).to(weight)
    return model(latents, torch.tensor([100, 700], device=weight.device), text)
