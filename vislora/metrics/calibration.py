"""Whether a classifier's probabilities mean what they say."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from vislora.errors import DataError

BINS = 15
_LOG_RANGE = 12.0  # temperatures are looked for from e^-12 to e^12


@dataclass(frozen=True)
class Calibration:
    """How confidence (the probability of the predicted class) and accuracy agree, in `BINS` equal bins of confidence.

    Attributes:
        temperature: what the logits were divided by; 1 as the model gives them.
        ece: expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599): the mean distance of a
            bin's confidence from its accuracy, weighted by its images. Bin i is (i / BINS, (i + 1) / BINS].
        nll: mean negative log-likelihood of the true classes, in nats.
        confidence, accuracy: means of each bin, 0 where it is empty.
        images: in each bin.
    """

    temperature: float
    ece: float
    nll: float
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    images: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def calibration(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Calibration:
    """Compare confidence and accuracy of logits (or log-probabilities) [N, K] with labels [N]."""
    scaled = logits.double() / temperature
    confidence, predicted = (column.numpy() for column in scaled.softmax(1).max(1))
    correct = predicted == labels.numpy()
    where = confidence_bins(confidence)
    images = np.bincount(where, minlength=BINS)
    means = [np.bincount(where, column, BINS) / images.clip(min=1) for column in (confidence, correct)]
    return Calibration(
        temperature=temperature,
        ece=float(np.abs(means[0] - means[1]) @ images / len(labels)),
        nll=F.cross_entropy(scaled, labels).item(),
        confidence=tuple(means[0].tolist()),
        accuracy=tuple(means[1].tolist()),
        images=tuple(images.tolist()),
    )


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence in (0, 1]: the right edge belongs to it."""
    return np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(np.int64)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes labels [N] most likely under logits [N, K] divided by it; it changes no ranking.

    Raises:
        DataError: there is none: no prediction is wrong, so that colder is always better, or they are no better than
            chance, so that hotter is.
    """
    logits = logits.double()
    true = logits.gather(1, labels[:, None])[:, 0]
    # the likelihood has one peak: these are its slopes at an infinite temperature, and at zero
    none_wrong = (logits.amax(1) - true).mean() <= 0
    if none_wrong or (true - logits.mean(1)).mean() <= 0:
        why = "none is classified wrongly" if none_wrong else "by their logits the classes are no likelier than others"
        raise DataError(
            f"no temperature fits the {len(labels)} validation images: {why}; validate on more, or leave calibrate out"
        )

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    found = minimize_scalar(nll, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)
