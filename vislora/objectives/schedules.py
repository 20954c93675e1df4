"""How noise is mixed into latents, and what the model is to predict: read from a diffusers scheduler."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vislora.errors import ModelError

_TOKEN = 2  # latents of a token's side, in SD3 and Flux


class Noised(NamedTuple):
    """A batch at its noise levels.

    Attributes:
        latents: [B, C, h, w], as the model sees them.
        timesteps: [B], as the model takes them.
        target: [B, C, h, w], what the model is to predict.
        weight: [B], of each sample's squared error under min-SNR weighting with the `gamma` given; else 1.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class Schedule(Protocol):
    def noise(self, latents: Tensor, noise: Tensor, levels: Tensor, gamma: float | None, shift: float = 1.0) -> Noised:
        """Mix noise [B, C, h, w] into latents at levels [B] in [0, 1]: 0 is the least noise, 1 the most. The odds of
        the times that they stand for are multiplied by `shift`; see `shifted`."""


def schedule(scheduler: Any, device: torch.device | str = "cpu") -> Schedule:
    """The noise schedule that a diffusers scheduler was made for, for latents on a device.

    Raises:
        ModelError: neither a discrete schedule of alphas nor a flow.
    """
    config = scheduler.config
    if config.get("timestep_type") == "continuous":
        raise ModelError(
            f"{type(scheduler).__name__} with timestep_type=continuous calls its model with the logarithm of the noise "
            "level, where the objectives here have timesteps; only timestep_type=discrete can be trained"
        )
    if "prediction_type" in config and hasattr(scheduler, "alphas_cumprod"):
        return Discrete(scheduler.alphas_cumprod.float().clone().to(device), config.prediction_type)
    if "base_shift" in config:
        return Flow(config.num_train_timesteps, _shift(config))
    raise ModelError(
        f"{type(scheduler).__name__} tells neither alphas nor a flow; no training objective follows from it"
    )


@dataclass(frozen=True)
class Discrete:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e at T discrete times (Ho et al. 2020, https://arxiv.org/abs/2006.11239).

    Attributes:
        alphas_cumprod: a_t, [T].
        prediction: epsilon, v_prediction (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) or sample.
    """

    alphas_cumprod: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                f"the scheduler's prediction_type is {self.prediction!r}: expected epsilon, v_prediction or sample"
            )

    def noise(self, latents: Tensor, noise: Tensor, levels: Tensor, gamma: float | None, shift: float = 1.0) -> Noised:
        times = len(self.alphas_cumprod)
        # a shifted level may have been rounded to 1
        timesteps = (shifted(levels, shift) * times).long().clamp(max=times - 1)
        share = self.alphas_cumprod[timesteps]
        a, s = share.sqrt()[:, None, None, None], (1.0 - share).sqrt()[:, None, None, None]
        target = {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}[self.prediction]
        weight = torch.ones_like(share) if gamma is None else self._min_snr(share / (1.0 - share), gamma)
        return Noised(a * latents + s * noise, timesteps, target, weight)

    def _min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) as the weight of x_0's error, turned into that of the predicted quantity's
        (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4)."""
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        capped = snr.clamp(max=gamma)
        return capped / (snr + 1.0) if self.prediction == "v_prediction" else capped


@dataclass(frozen=True)
class Flow:
    """x_s = (1 - s) x_0 + s e; the model predicts e - x_0 (Lipman et al. 2022, https://arxiv.org/abs/2210.02747).

    Levels become s through a logit-normal distribution, and then the scheduler's shift towards more noise
    (Esser et al. 2024, https://arxiv.org/abs/2403.03206). Min-SNR weighting isn't defined for it.

    Attributes:
        times: what the model takes for s = 1.
        shift: the factor on s / (1 - s), by the number of the picture's tokens.
    """

    times: int
    shift: Callable[[int], float]

    def noise(self, latents: Tensor, noise: Tensor, levels: Tensor, gamma: float | None, shift: float = 1.0) -> Noised:
        drawn = torch.special.ndtri(levels.clamp(1e-6, 1.0 - 1e-6)).sigmoid()
        own = self.shift((latents.shape[2] // _TOKEN) * (latents.shape[3] // _TOKEN))
        sigma = shifted(drawn, shift * own)
        s = sigma[:, None, None, None]
        return Noised((1.0 - s) * latents + s * noise, sigma * self.times, noise - latents, torch.ones_like(sigma))


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times t in [0, 1] whose odds t / (1 - t) are multiplied (Esser et al. 2024, section 5.3.2)."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def _shift(config: Any) -> Callable[[int], float]:
    """The scheduler's shift: one number, or as Flux has it one that grows with the picture."""
    if not config.use_dynamic_shifting:
        return lambda tokens: config.shift

    def grown(tokens: int) -> float:
        share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + share * (config.max_shift - config.base_shift)
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    return grown
