"""The parts of a pipeline that learn, as one module: the denoiser and, where they learn too, its text encoders."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vislora.models.families import ENCODERS, TOKENS, Text, family_of


class Denoiser(nn.Module):
    """Noisy latents [B, C, h, w], timesteps [B] and text -> prediction [B, C, h, w].

    Text is either tokens (`input_ids` [B, L], and `input_ids_2`, … where there are more encoders) or what the encoders
    made of them (`prompt_embeds` [B, L, D], and `pooled_prompt_embeds` [B, P] where the family has them); SDXL needs
    `time_ids` [B, 6] besides. `dropped` [B] tells whose caption is left out: where the pipeline's own text for none is
    zeros, as SDXL's is, theirs becomes that. The children bear the names of the pipeline's components, and so does
    every parameter.

    Args:
        pipe: a pipeline of diffusers.
        text: the text encoders are part of it.

    Raises:
        ModelError: the pipeline is of a family that isn't known.
    """

    def __init__(self, pipe: Any, text: bool) -> None:
        super().__init__()
        self.family = family_of(pipe)
        self.zeros_for_none = bool(pipe.config.get("force_zeros_for_empty_prompt"))
        for name in (self.family.component, *(text_encoders(pipe) if text else ())):
            setattr(self, name, getattr(pipe, name))

    def train(self, mode: bool = True) -> "Denoiser":
        """As of any module, but that text encoders without a trained parameter, as T5, go on without dropout: text is
        encoded as it is in sampling."""
        super().train(mode)
        for encoder in (getattr(self, name) for name in ENCODERS if hasattr(self, name)):
            if not any(p.requires_grad for p in encoder.parameters()):
                encoder.eval()
        return self

    def forward(self, latents: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        if "prompt_embeds" not in text:
            encoders = [getattr(self, name) for name in ENCODERS if hasattr(self, name)]
            text = text | self.family.encode(encoders, [text[key] for key in TOKENS if key in text])
        if self.zeros_for_none and "dropped" in text:
            encoded = {key: value for key, value in text.items() if key.endswith("prompt_embeds")}
            rows = {key: text["dropped"].view(-1, *[1] * (value.dim() - 1)) for key, value in encoded.items()}
            text = text | {key: value.masked_fill(rows[key], 0.0) for key, value in encoded.items()}
        return self.family.predict(getattr(self, self.family.component), latents, timesteps, text)


def text_encoders(pipe: Any) -> list[str]:
    """Names of the pipeline's text encoders, in order."""
    return [name for name in ENCODERS if getattr(pipe, name, None) is not None]


class Reader(NamedTuple):
    """A text encoder's tokenizer, and how many tokens it reads."""

    tokenizer: Any
    length: int


def readers(pipe: Any) -> list[Reader]:
    """Those of the pipeline's text encoders, in order."""
    tokenizers = [getattr(pipe, name.replace("text_encoder", "tokenizer")) for name in text_encoders(pipe)]
    lengths = zip(tokenizers, family_of(pipe).lengths, strict=True)
    return [Reader(tokenizer, length or tokenizer.model_max_length) for tokenizer, length in lengths]


def cut_off(reading: Sequence[Reader], captions: Sequence[str]) -> list[int]:
    """Indices of the captions that are longer than any of the text encoders reads: their end counts for nothing."""
    longest = max(reading, key=lambda reader: reader.length)
    tokens = longest.tokenizer(list(captions), verbose=False).input_ids
    return [i for i, own in enumerate(tokens) if len(own) > longest.length]


def tokenize(pipe: Any, captions: list[str]) -> Text:
    """Token numbers of each text encoder, [B, L], cut and filled up to the length it reads."""
    found: Text = {}
    for name, (tokenizer, length) in zip(text_encoders(pipe), readers(pipe), strict=True):
        found[TOKENS[ENCODERS.index(name)]] = tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
    return found


def encode_text(pipe: Any, tokens: Text) -> Text:
    """What the denoiser reads, from `tokenize`'s numbers."""
    encoders = [getattr(pipe, name) for name in text_encoders(pipe)]
    return family_of(pipe).encode(encoders, [tokens[key] for key in TOKENS if key in tokens])


@torch.no_grad()
def encode_images(vae: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] as the denoiser sees them; the mode, where the autoencoder
    gives a distribution."""
    encoded = vae.encode(images.to(vae.dtype))
    latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float()
    config = vae.config
    if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
