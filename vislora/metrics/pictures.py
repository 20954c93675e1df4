"""Scores of drawn pictures: their style, what they show, how much they vary, and intervals over their prompts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vislora.errors import DataError
from vislora.metrics.intervals import mean_interval

TITLES = {  # as they are called in files, and in tables
    "style": "style",
    "content": "content",
    "style_class": "taken for the style",
    "content_class": "taken for the label",
    "text_image": "CLIP score",
    "kernel": "kernel distance",
    "frechet": "Fréchet distance",
    "drift": "drift elsewhere",
    "diversity": "diversity",
}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; without one where nothing can be resampled."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class StyleAxis:
    """The way from the style of a base model to that of reference pictures.

    Style is told by the mean and standard deviation of each channel of a network over the positions of a picture, as
    adaptive instance normalisation (Huang and Belongie 2017, https://arxiv.org/abs/1703.06868) sets it; Gatys et al.
    2016 compare channels' products, and Li et al. 2017 (https://arxiv.org/abs/1701.01036) find that means and
    deviations serve as well. Each statistic counts in units of its standard deviation within a set, as in a linear
    discriminant with a diagonal covariance, so that what varies with a picture's content alone counts little.

    Attributes:
        origin: mean statistics of the base model's pictures, [S].
        direction: [S], such that (statistics - origin) @ direction is 0 for the base's mean, 1 for the reference's.
    """

    origin: Tensor
    direction: Tensor

    @staticmethod
    def between(base: Tensor, reference: Tensor) -> "StyleAxis":
        """From statistics of the base model's pictures [N, S] and of the reference's [M, S].

        Raises:
            DataError: the two have the same mean, so that nothing leads from one to the other.
        """
        origin, way = base.mean(0), reference.mean(0) - base.mean(0)
        variance = (base.var(0, correction=0) + reference.var(0, correction=0)) / 2
        weighted = torch.where(variance > 1e-12, way / variance.clamp_min(1e-12), 0.0)
        if not way @ weighted > 0:
            raise DataError("the reference pictures have the base model's style; give others as reference")
        return StyleAxis(origin, weighted / (way @ weighted))

    def along(self, statistics: Tensor) -> Tensor:
        """How far pictures with statistics [N, S] have come: 0 the base model's style, 1 the reference's; [N]."""
        return (statistics - self.origin) @ self.direction


def kept_content(pooled: Tensor, base: Tensor) -> Tensor:
    """Cosine similarity of each picture's features [N, D] with those of the base model's picture from the same noise
    and prompt, [N]: on DINO's features what Ruiz et al. 2022 (https://arxiv.org/abs/2208.12242) compare subjects by."""
    return F.cosine_similarity(pooled, base)


def diversity(pooled: Tensor) -> Tensor:
    """Mean cosine distance of the pairs of pictures of each prompt, from features [P, S, D] of S >= 2 pictures each;
    [P]."""
    unit = F.normalize(pooled, dim=-1)
    s = pooled.shape[1]
    pairs = (unit @ unit.mT).sum((1, 2)) - s  # each pair twice, without those of a picture with itself
    return 1 - pairs / (s * (s - 1))


def mean_estimate(values: Tensor, seeds: int = 1, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of values [P * seeds] of P prompts, `seeds` pictures each in a row, with the bootstrap's 95% interval
    over prompts: pictures of one prompt have much in common, and count as one. With a single prompt over its pictures;
    none over a single picture."""
    by_prompt: np.ndarray = values.double().reshape(-1, seeds).numpy()
    drawn = by_prompt.mean(1) if len(by_prompt) > 1 else by_prompt[0]
    mean = float(drawn.mean())
    return Estimate(mean, *mean_interval(drawn, resamples, seed)) if len(drawn) > 1 else Estimate(mean)
