"""What the families of text-to-image pipelines do with text, and how their denoisers are called.

A family is one row in `_FAMILIES`: the class of its denoiser, the pipeline name for it, how tokens become text, and how
latents, timesteps and text become a prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import ModelError

Text = dict[str, Tensor]
"""Named tensors with B rows each: tokens, or what the encoders made of them."""

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENS = ("input_ids", "input_ids_2", "input_ids_3")


@dataclass(frozen=True)
class Family:
    """How a kind of pipeline is trained.

    Attributes:
        component: the pipeline's name for its denoiser.
        multiple: pixels that the sides of the pictures it draws are multiples of.
        lengths: tokens that each text encoder reads; None: as many as its tokenizer says.
        encode: text encoders in order and their tokens -> text, as the pipeline's own `encode_prompt` computes it.
        predict: denoiser, latents [B, C, h, w], timesteps [B] and text -> prediction [B, C, h, w].
        unread: last layers of each text encoder that `encode` makes no use of.
        packed: latents of a side that are one token's channels when the denoiser gets them.
    """

    component: str
    multiple: int
    lengths: tuple[int | None, ...]
    encode: Callable[[list[nn.Module], list[Tensor]], Text]
    predict: Callable[[nn.Module, Tensor, Tensor, Text], Tensor]
    unread: tuple[int, ...]
    packed: int = 1


def family_of(pipe: Any) -> Family:
    """The pipeline's family.

    Raises:
        ModelError: none that is known, a text encoder is missing, or the denoiser wants more than noise and text.
    """
    for component in ("unet", "transformer"):
        denoiser = getattr(pipe, component, None)
        count = sum(getattr(pipe, name, None) is not None for name in ENCODERS)
        found = _FAMILIES.get((type(denoiser).__name__, count))
        if found is not None:
            _check_inputs(pipe, denoiser.config, count, found.packed)
            return found
    known = ", ".join(sorted({f"{name} with {count} text encoders" for name, count in _FAMILIES}))
    raise ModelError(f"{type(pipe).__name__} can't be trained: expected {known}")


def lengths_of(denoiser: str, encoders: int) -> tuple[int | None, ...]:
    """`Family.lengths` of the class of a denoiser with so many text encoders; () where no such family is known."""
    family = _FAMILIES.get((denoiser, encoders))
    return () if family is None else family.lengths


def _check_inputs(pipe: Any, config: Any, encoders: int, packed: int) -> None:
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise ModelError(
            f"{type(pipe).__name__} can't be trained: its denoiser is told the guidance (time_cond_proj_dim="
            f"{config.time_cond_proj_dim}), as models distilled to a few steps are; train on the model that it was "
            "distilled from, and draw with the adapter in both"
        )
    for key in ("class_embed_type", "num_class_embeds"):
        if getattr(config, key, None) is not None:
            raise ModelError(
                f"{type(pipe).__name__} can't be trained: its denoiser wants a class beside the text ({key}="
                f"{getattr(config, key)}); take one that draws from text alone"
            )
    if encoders == 1 and config.addition_embed_type is not None:
        raise ModelError(
            f"{type(pipe).__name__} can't be trained: one text encoder and addition_embed_type="
            f"{config.addition_embed_type}, as SDXL's refiner has them; take the base model that it refines"
        )
    if config.in_channels != (channels := pipe.vae.config.latent_channels * packed**2):
        raise ModelError(
            f"{type(pipe).__name__} can't be trained: its denoiser takes {config.in_channels} channels where latents "
            f"have {channels}, as models for inpainting and editing do; take one that draws from text alone"
        )


def _encode_sd(encoders: list[nn.Module], tokens: list[Tensor]) -> Text:
    return {"prompt_embeds": encoders[0](tokens[0])[0]}


def _predict_sd(unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    return unet(latents, timesteps, encoder_hidden_states=text["prompt_embeds"], return_dict=False)[0]


def _encode_sdxl(encoders: list[nn.Module], tokens: list[Tensor]) -> Text:
    joined, pooled = _clips(encoders, tokens)
    return {"prompt_embeds": joined, "pooled_prompt_embeds": pooled[-1]}


def _predict_sdxl(unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
    embeds = text["prompt_embeds"]
    return unet(latents, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def _encode_sd3(encoders: list[nn.Module], tokens: list[Tensor]) -> Text:
    joined, pooled = _clips(encoders[:2], tokens[:2])
    t5 = encoders[2](tokens[2])[0]
    joined = F.pad(joined, (0, t5.shape[-1] - joined.shape[-1]))
    return {"prompt_embeds": torch.cat([joined, t5], dim=1), "pooled_prompt_embeds": torch.cat(pooled, dim=-1)}


def _predict_sd3(transformer: nn.Module, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    return transformer(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=text["prompt_embeds"],
        pooled_projections=text["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def _encode_flux(encoders: list[nn.Module], tokens: list[Tensor]) -> Text:
    clip, t5 = encoders
    return {"prompt_embeds": t5(tokens[1])[0], "pooled_prompt_embeds": clip(tokens[0]).pooler_output}


def _predict_flux(transformer: nn.Module, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
    """Two by two latents are one token; a distilled guidance is told what the pipeline samples with by default."""
    batch, channels, height, width = latents.shape
    packed = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    where = torch.zeros(height // 2, width // 2, 3, device=latents.device)
    where[..., 1] = torch.arange(height // 2, device=latents.device)[:, None]
    where[..., 2] = torch.arange(width // 2, device=latents.device)
    predicted = transformer(
        hidden_states=packed.reshape(batch, -1, 4 * channels),
        timestep=timesteps / 1000,
        guidance=torch.full_like(timesteps, 3.5) if transformer.config.guidance_embeds else None,
        pooled_projections=text["pooled_prompt_embeds"],
        encoder_hidden_states=text["prompt_embeds"],
        txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3, device=latents.device),
        img_ids=where.flatten(0, 1),
        return_dict=False,
    )[0]
    tiles = predicted.view(batch, height // 2, width // 2, channels, 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def _clips(encoders: list[nn.Module], tokens: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The last but one hidden state of each CLIP, joined [B, L, D1 + D2], and each one's pooled projection."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), [output[0] for output in outputs]


_FAMILIES: dict[tuple[str, int], Family] = {  # by the denoiser's class and the number of text encoders
    ("UNet2DConditionModel", 1): Family("unet", 8, (None,), _encode_sd, _predict_sd, (0,)),
    ("UNet2DConditionModel", 2): Family("unet", 8, (None, None), _encode_sdxl, _predict_sdxl, (1, 0)),
    ("SD3Transformer2DModel", 3): Family("transformer", 16, (None, None, 256), _encode_sd3, _predict_sd3, (0, 0, 0)),
    ("FluxTransformer2DModel", 2): Family("transformer", 16, (None, 512), _encode_flux, _predict_flux, (0, 0), 2),
}
