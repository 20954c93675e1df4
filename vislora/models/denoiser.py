"""The parts of a pipeline that learn, as one module: a UNet and, where they learn too, its text encoders."""

from typing import Any

import torch
from torch import Tensor, nn

from vislora.errors import ModelError

_TEXT_ENCODERS = {"input_ids": "text_encoder", "input_ids_2": "text_encoder_2"}


class Denoiser(nn.Module):
    """Noisy latents [B, C, h, w], timesteps [B] and text -> prediction [B, C, h, w].

    Text is either tokens (`input_ids` [B, L], for SDXL also `input_ids_2`) or what the encoders made of them
    (`prompt_embeds` [B, L, D], for SDXL also `pooled_prompt_embeds` [B, P]); SDXL needs `time_ids` [B, 6] besides.
    The children bear the names of the pipeline's components, and so does every parameter.

    Raises:
        ModelError: the pipeline is of a family that isn't known here.
    """

    def __init__(self, pipe: Any, text: bool) -> None:
        super().__init__()
        if not hasattr(pipe, "unet") or not hasattr(pipe, "text_encoder"):
            raise ModelError(f"{type(pipe).__name__} can't be trained: expected a UNet and a CLIP text encoder")
        self.unet = pipe.unet
        for name in text_encoders(pipe) if text else ():
            setattr(self, name, getattr(pipe, name))

    def forward(self, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
        if "prompt_embeds" not in text:
            text = text | encode_text(dict(self.named_children()), text)
        added = None
        if "pooled_prompt_embeds" in text:
            added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


def text_encoders(pipe: Any) -> list[str]:
    """Names of the pipeline's text encoders, in order."""
    return [name for name in _TEXT_ENCODERS.values() if getattr(pipe, name, None) is not None]


def tokenize(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """Token numbers of each text encoder, [B, L], cut and filled up to the tokenizer's length."""
    tokens = {}
    for key, name in _TEXT_ENCODERS.items():
        if getattr(pipe, name, None) is not None:
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            tokens[key] = tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
    return tokens


def encode_text(encoders: dict[str, nn.Module], tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the UNet reads, as the pipelines compute it: the last hidden state of a single encoder; of two, the last but
    one of each, joined, and the second's pooled projection."""
    if "text_encoder_2" not in encoders:
        return {"prompt_embeds": encoders["text_encoder"](tokens["input_ids"])[0]}
    found = [(encoders[name], tokens[key]) for key, name in _TEXT_ENCODERS.items() if name in encoders]
    outputs = [encoder(numbers, output_hidden_states=True) for encoder, numbers in found]
    joined = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"prompt_embeds": joined, "pooled_prompt_embeds": outputs[-1][0]}


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] as the UNet sees them; the mode, where the autoencoder
    gives a distribution."""
    encoded = vae.encode(images.to(vae.dtype))
    latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float()
    config = vae.config
    if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
