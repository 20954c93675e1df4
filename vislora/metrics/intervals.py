"""95% intervals of a classifier's figures: what another draw of test images would have changed. Another training isn't
in them.

Top-1 and top-5, shares of the images, have Wilson's interval (1927, https://doi.org/10.1080/01621459.1927.10502953),
which tells of few images that are all right as well: of six it goes down to 61%. The other figures have the bootstrap
of Efron (1979, https://doi.org/10.1214/aos/1176344552), its percentile interval, which is a point there, as each draw
is like the other; so do differences of two classifiers, in all figures. Both are scipy's.

Chance never lessens a calibration error, whose terms are distances: of a well calibrated classifier a draw has half as
much again as the figure itself. So its interval is moved back by the mean of what the draws add, and tells what other
images would have changed of a figure that holds as much chance as this one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from vislora.metrics.calibration import BINS, confidence_bins

FIGURES = ("top1", "top5", "balanced_accuracy", "macro_f1", "ece")
_CHUNK = 2_000_000  # indices drawn at a time

Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], np.ndarray]
"""Figures [F, R] of the images chosen in each of R draws, [R, N]."""


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of each of N images; arrays [N]."""

    labels: np.ndarray
    predicted: np.ndarray
    in_top5: np.ndarray
    confidence: np.ndarray
    classes: int

    @staticmethod
    def of(probabilities: Tensor, labels: Tensor) -> "Outcomes":
        """From probabilities [N, K] and labels [N]."""
        k = probabilities.shape[1]
        best = probabilities.topk(min(5, k)).indices
        confidence, predicted = probabilities.max(1)
        in_top5 = (best == labels[:, None]).any(1)
        return Outcomes(*(t.numpy() for t in (labels, predicted, in_top5, confidence.to(torch.float64))), k)

    def figures(self, chosen: np.ndarray) -> np.ndarray:
        """`FIGURES` of the images `chosen` [R, N], for each of R draws: [5, R]."""
        labels, predicted = self.labels[chosen], self.predicted[chosen]
        correct = labels == predicted
        true, hits = _counts(labels, self.classes), _counts(labels, self.classes, correct)
        either = true + _counts(predicted, self.classes)
        gap = self.confidence[chosen] - correct
        errors = _counts(confidence_bins(self.confidence)[chosen], BINS, gap)
        return np.stack(
            [
                correct.mean(1),
                self.in_top5[chosen].mean(1),
                _mean_of_present(hits, true),
                _mean_of_present(2 * hits, either),
                np.abs(errors).sum(1) / chosen.shape[1],
            ]
        )


def intervals(outcomes: Outcomes, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """A 95% interval of each of `FIGURES`."""
    n = len(outcomes.labels)
    found = _of_figures(outcomes.figures, n, resamples, seed)
    found["ece"] = max(found["ece"][0], 0.0), found["ece"][1]
    shares = {"top1": outcomes.labels == outcomes.predicted}
    if outcomes.classes > 5:  # or all are among five
        shares["top5"] = outcomes.in_top5
    for name, right in shares.items():
        share = binomtest(int(right.sum()), n).proportion_ci(method="wilson")
        found[name] = float(share.low), float(share.high)
    return found


def differences(one: Outcomes, other: Outcomes, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """A 95% interval of what `one` has more of each of `FIGURES` than `other`, both scored on the same images in the
    same order: each draw is of images, for both alike, so that what is hard for both cancels out."""
    if not np.array_equal(one.labels, other.labels):
        raise ValueError("a paired comparison needs the same images in the same order")

    def difference(chosen: np.ndarray) -> np.ndarray:
        return one.figures(chosen) - other.figures(chosen)

    return _of_figures(difference, len(one.labels), resamples, seed)


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Interval:
    """A 95% interval of the mean of values [N]."""
    (interval,), _ = _percentiles(lambda chosen: values[chosen].mean(1)[None], len(values), resamples, seed)
    return interval


def _of_figures(figures: Statistic, n: int, resamples: int, seed: int) -> dict[str, Interval]:
    """The intervals by their names, that of the calibration error moved back by what the draws add."""
    ends, means = _percentiles(figures, n, resamples, seed)
    found, place = dict(zip(FIGURES, ends, strict=True)), FIGURES.index("ece")
    added = means[place] - figures(np.arange(n)[None])[place, 0].item()
    return found | {"ece": (found["ece"][0] - added, found["ece"][1] - added)}


def _percentiles(figures: Statistic, n: int, resamples: int, seed: int) -> tuple[list[Interval], list[float]]:
    """Of each figure the interval, and the mean of the draws."""
    if n == 1:  # every draw is that one, and scipy refuses it
        values = figures(np.zeros((1, 1), int))[:, 0].tolist()
        return [(value, value) for value in values], values
    drawn = bootstrap(
        (np.arange(n),),
        lambda chosen, axis: figures(np.atleast_2d(chosen)),
        n_resamples=resamples,
        batch=max(1, _CHUNK // n),
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = (end.tolist() for end in drawn.confidence_interval)
    return list(zip(low, high, strict=True)), drawn.bootstrap_distribution.mean(-1).tolist()


def _counts(values: np.ndarray, bins: int, weights: np.ndarray | None = None) -> np.ndarray:
    """How often each of `bins` values occurs in each row of [R, N], or the weights' sum: [R, bins]."""
    rows = values.shape[0]
    flat = (values + bins * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, None if weights is None else weights.ravel(), rows * bins).reshape(rows, bins)


def _mean_of_present(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The mean of part / whole over the classes that occur, for each row."""
    present = whole > 0
    return np.where(present, part / np.maximum(whole, 1), 0).sum(1) / present.sum(1)
