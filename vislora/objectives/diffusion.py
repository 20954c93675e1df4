"""Diffusion: the squared error of what the scheduler wants predicted, validated on noise that never changes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from vislora.data.encoded import Encoder
from vislora.data.order import mix
from vislora.objectives.schedules import Schedule

VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Diffusion:
    """Predict the noise (or velocity, or flow) in latents, given their captions.

    A batch holds `latents` [B, C, h, w], `seed` [B] from which all of a sample's random numbers are drawn, `weight` [B]
    and `text`, a dict of tensors with B rows, as `vislora.models.denoiser.Denoiser` takes it.

    Attributes:
        schedule: how noise is mixed in, and what is predicted.
        no_text: the `text` of one empty caption, for dropped ones.
        encoder: encodes `images` [B, 3, H, W], where a batch holds them instead of latents.
        encode_text: encode such a batch's tokens too; the model does so where its text encoders learn.
        min_snr_gamma: cap of the signal-to-noise ratio in the loss weight; None: every noise level weighs the same.
        noise_offset: strength of the noise that all pixels of a channel share, so that a style may change how bright
            whole images are (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        caption_dropout: share of showings without a caption, for classifier-free guidance.
        timestep_shift: factor on the odds t / (1 - t) of each drawn time t, as a share of all (Esser et al. 2024,
            https://arxiv.org/abs/2403.03206, section 5.3.2): above 1 there is more noise in training.
    """

    monitor: ClassVar[str] = "val_loss"
    on_cpu: ClassVar[tuple[str, ...]] = ("seed",)
    higher_is_better: ClassVar[bool] = False
    schedule: Schedule
    no_text: dict[str, Tensor]
    encoder: Encoder | None = None
    encode_text: bool = False
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    timestep_shift: float = 1.0

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss of each sample, [B]."""
        latents, text = self._encoded(batch)
        noise, levels, dropped = self._draw(batch["seed"], latents)
        text = self._without_captions(text, dropped)
        noised = self.schedule.noise(latents, noise, levels, self.min_snr_gamma, self.timestep_shift)
        predicted = model(noised.latents, noised.timesteps, text).float()
        return noised.weight * batch["weight"] * (predicted - noised.target).square().mean((1, 2, 3))

    @torch.no_grad()
    def validate(self, model: nn.Module, batches: Iterable, accelerator: Accelerator) -> dict[str, float]:
        """Mean squared error over all processes' batches, each sample at five noise levels.

        Noise and levels depend on the sample's place in the data alone, so that runs can be compared.
        """
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            latents, text = self._encoded(send_to_device(batch, accelerator.device))
            for level in VALIDATION_LEVELS:
                noise = _normal([mix(seed, round(10 * level)) for seed in batch["seed"].tolist()], latents)
                noised = self.schedule.noise(latents, noise, torch.full_like(latents[:, 0, 0, 0], level), None)
                predicted = model(noised.latents, noised.timesteps, text).float()
                error = (predicted - noised.target).square().mean((1, 2, 3)).sum()
                totals += torch.tensor([error.item(), len(latents)], dtype=torch.float64)
        loss, count = sum(gather_object([totals])).tolist()
        return {self.monitor: loss / count}

    def _encoded(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and text of a batch."""
        if "latents" in batch:
            return batch["latents"].float(), batch["text"]
        with torch.no_grad():
            text = batch["text"]
            if self.encode_text:
                text = text | self.encoder.text(text)
            return self.encoder.images(batch["images"]).float(), text

    def _without_captions(self, text: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
        """The empty caption in the place of dropped [B] ones, which the model is told too."""
        changed = text | {"dropped": dropped}
        for name, empty in self.no_text.items():
            rows = dropped.view(-1, *[1] * (text[name].dim() - 1))
            changed[name] = torch.where(rows, empty.to(text[name]), text[name])
        return changed

    def _draw(self, seeds: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise like latents, levels [B] in [0, 1] and whether the caption is dropped [B]: functions of the seeds,
        which are on the CPU, so that nothing waits for a GPU."""
        noise, shared, chances = [], [], []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.randn(latents.shape[1:], generator=generator))
            shared.append(torch.randn(latents.shape[1], 1, 1, generator=generator))
            chances.append(torch.rand(2, generator=generator))
        levels, drops = torch.stack(chances).to(latents.device, non_blocking=True).unbind(1)
        mixed = torch.stack(noise) + self.noise_offset * torch.stack(shared)
        return mixed.to(latents.device, non_blocking=True), levels, drops < self.caption_dropout


def _normal(seeds: list[int], latents: Tensor) -> Tensor:
    """Normal noise like latents [B, C, h, w], one seed a sample."""
    rows = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(latents.device)
