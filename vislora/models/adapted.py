"""Adapters put into a diffusion pipeline, and proven to act."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vislora.config.adapter import LoraAdapter, PipelineLora
from vislora.errors import AdapterError
from vislora.formats.components import named_by_component
from vislora.formats.diffusers import check_holdable
from vislora.lora import Adapter, Adapters, LoraSettings, TargetLayer, prove_alive
from vislora.models.denoiser import Denoiser, encode_text, text_encoders, tokenize
from vislora.models.fitted import fitted
from vislora.targets.diffusers import find_targets


def adapt_pipeline(pipe: Any, config: PipelineLora, start: Adapter | None = None) -> Adapters:
    """Freeze a pipeline and put adapters into its denoiser and, if wanted, its text encoders, but those that diffusers
    loads no adapters for; prove that each one acts.

    Args:
        start: the adapter to go on from, in place of a new one; `config.start` is its name in messages.

    Returns:
        the adapters, holding one named "default", its layers named by component: `unet.mid_block.…`.

    Raises:
        AdapterError: targets that aren't there, or that can't move the prediction; or an adapter to go on from that
            doesn't fit.
        ModelError: a pipeline of a family that isn't known.
    """
    model = Denoiser(pipe, config.text_encoder)
    adapters = Adapters(model)
    if start is None:
        adapters.add("default", _targets(pipe, config, model), lora_settings(config))
    else:
        adapters.load("default", _started(start, config, model))
    prove_alive(model, lambda: _example(model, pipe, config.text_encoder))
    return adapters


def _targets(pipe: Any, config: PipelineLora, model: Denoiser) -> list[TargetLayer]:
    component = model.family.component
    words, kinds = [target.value for target in config.targets], [kind.value for kind in config.attention]
    found = find_targets(getattr(pipe, component), words, config.blocks, kinds)
    targets = [TargetLayer(f"{component}.{target.name}", target.rows) for target in found]
    for name, unread in zip(text_encoders(pipe), model.family.unread, strict=True) if config.text_encoder else ():
        if name not in pipe._lora_loadable_modules:  # T5: diffusers would leave its layers aside without a word
            continue
        encoder = getattr(pipe, name)
        chosen = find_targets(encoder, ["qkv", "o"], range(encoder.config.num_hidden_layers - unread))
        targets += [TargetLayer(f"{name}.{target.name}", target.rows) for target in chosen]
    return targets


def _started(start: Adapter, config: PipelineLora, model: Denoiser) -> Adapter:
    """The adapter to go on from, in the model's names."""
    start = named_by_component(start, model.family.component)
    if whole := [*start.trained, *start.biases]:
        raise AdapterError(f"adapter.start={config.start} trains {whole[0]} in full, which pipelines' files can't hold")
    if absent := {name.partition(".")[0] for name in start.layers} - dict(model.named_children()).keys():
        raise AdapterError(
            f"adapter.start={config.start} has layers in {min(absent)}, which isn't trained here; "
            "adapter.text_encoder=true trains text encoders"
        )
    try:  # what is trained is written as diffusers' file, which would be found out after the last step
        check_holdable(start)
    except AdapterError as error:
        raise AdapterError(
            f"adapter.start={config.start}: {error}, and the trained adapter is to be diffusers' file; go on from one "
            "whose layers are all with DoRA, or all without"
        ) from None
    return replace(fitted(start, model, type(model).__name__), dropout=config.dropout)


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


def _example(model: Denoiser, pipe: Any, text_encoder: bool) -> Tensor:
    """The prediction for two small noises and two captions."""
    weight = next(getattr(pipe, model.family.component).parameters())
    latents = torch.randn(2, pipe.vae.config.latent_channels, 16, 16, dtype=weight.dtype, device=weight.device)
    encoder = next(getattr(pipe, text_encoders(pipe)[0]).parameters())
    text = {key: ids.to(encoder.device) for key, ids in tokenize(pipe, ["a bird", "two"]).items()}
    if not text_encoder:
        with torch.no_grad():
            text = encode_text(pipe, text)
    text["time_ids"] = torch.full((2, 6), 64.0, dtype=weight.dtype)
    text = {key: value.to(weight.device) for key, value in text.items()}
    return model(latents, torch.tensor([100.0, 700.0], dtype=weight.dtype, device=weight.device), text)
