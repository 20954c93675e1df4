"""Scores of drawn pictures: their style, what they show, how much they vary, and intervals over their prompts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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

    The means are those of few pictures, and a picture that has a part in one lies nearer to it than another of its
    kind would. So for each prompt the way begins at the mean over the others, and what the means' own noise adds to
    the way's length is taken off: other pictures in the base's style are at 0, and in the reference's at 1, on average.

    Attributes:
        base: statistics of the base model's pictures, [N, S].
        ways: for each of these, [N, S], such that (statistics - base) @ way is 1 from one mean to the other.
    """

    base: Tensor
    ways: Tensor

    @staticmethod
    def between(base: Tensor, reference: Tensor, seeds: int = 1) -> "StyleAxis | None":
        """None where the means are no further apart than by chance, to which half of the way's length would be due.

        Args:
            base: statistics of the base model's pictures [P * seeds, S] of P >= 2 prompts, `seeds` each in a row.
            reference: of the reference's pictures, [M, S], M >= 2.
        """
        variance = (base.var(0, correction=0) + reference.var(0, correction=0)) / 2
        weight = torch.where(variance > 1e-12, 1 / variance.clamp_min(1e-12), 0.0)
        prompts = base.unflatten(0, (-1, seeds)).mean(1)
        length = (reference.mean(0) - prompts.mean(0)).square() @ weight
        noise = sum(means.var(0) / len(means) @ weight for means in (prompts, reference))
        if not noise < length / 2:
            return None
        others = (prompts.sum(0) - prompts) / (len(prompts) - 1)
        ways = (reference.mean(0) - others) * weight / (length - noise)
        return StyleAxis(base, ways.repeat_interleave(seeds, 0))

    def along(self, statistics: Tensor) -> Tensor:
        """How far pictures with statistics [N, S], of the base's prompts and noise, have come: 0 the base model's
        style, 1 the reference's; [N]."""
        return ((statistics - self.base) * self.ways).sum(1)


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
