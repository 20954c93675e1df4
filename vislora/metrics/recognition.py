"""Scores of a classifier over a data set, by torchmetrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from vislora.files import write_json, write_rows
from vislora.metrics.calibration import Calibration, calibration
from vislora.metrics.intervals import Interval, Outcomes, intervals
from vislora.names import aligned


@dataclass(frozen=True)
class Predictions:
    """What a classifier said about N images.

    Attributes:
        classes: K names.
        logits: float32 [N, K].
        labels: [N] indices into classes.
        names: of the images, such as paths.
        images_per_s: of the whole pass, decoding included; None where it wasn't timed.
    """

    classes: tuple[str, ...]
    logits: Tensor
    labels: Tensor
    names: Sequence[str]
    images_per_s: float | None = None

    def probabilities(self) -> Tensor:
        """float64 [N, K]."""
        return self.logits.double().softmax(1)

    def in_order_of(self, classes: tuple[str, ...]) -> "Predictions":
        """The same with the same classes in another order."""
        places = torch.tensor([self.classes.index(name) for name in classes])
        return replace(self, classes=classes, logits=self.logits[:, places], labels=places.argsort()[self.labels])

    def outcomes(self) -> Outcomes:
        """What resampling needs to know of each image."""
        return Outcomes.of(self.probabilities(), self.labels)


@dataclass(frozen=True)
class Mistake:
    """An image taken for another class, with the probability the classifier gave to that."""

    name: str
    true: str
    predicted: str
    probability: float
    picture: Image.Image


@dataclass(frozen=True)
class Evaluation:
    """Figures over N images and K classes.

    Attributes:
        predictions: what they were computed from.
        top1, top5: share of images whose class is first, or among the first five (all K where there are fewer).
        balanced_accuracy: mean recall of the classes that have images.
        macro_f1: mean F1 of the classes that have images or were predicted.
        precision, recall, f1: [K]; 0 where undefined.
        confusion: [K, K] counts, row: true class, column: predicted.
        calibration: of the probabilities as they are.
        calibrated: after a temperature fitted on validation images; None where none was.
        intervals: 95%, of top1, top5, balanced_accuracy, macro_f1 and ece, as `vislora.metrics.intervals` has them.
        mistakes: the most confident ones first.
    """

    predictions: Predictions
    top1: float
    top5: float
    balanced_accuracy: float
    macro_f1: float
    precision: Tensor
    recall: Tensor
    f1: Tensor
    confusion: Tensor
    calibration: Calibration
    calibrated: Calibration | None
    intervals: dict[str, Interval]
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictions.classes

    @property
    def count(self) -> int:
        return len(self.predictions.labels)

    @property
    def images_per_s(self) -> float | None:
        return self.predictions.images_per_s

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        support = self.confusion.sum(1).tolist()
        return {
            "images": self.count,
            "top1": self.top1,
            "top5": self.top5,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "ece": self.calibration.ece,
            "nll": self.calibration.nll,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "images_per_s": self.images_per_s,
            "calibration": self.calibration.to_dict(),
            "calibrated": None if self.calibrated is None else self.calibrated.to_dict(),
            "per_class": {
                name: {
                    "images": support[k],
                    "precision": self.precision[k].item(),
                    "recall": self.recall[k].item(),
                    "f1": self.f1[k].item(),
                }
                for k, name in enumerate(self.classes)
            },
        }

    def table(self) -> str:
        """The figures as text."""
        rows = [("", "images", "precision", "recall", "F1")]
        for name, row in self.to_dict()["per_class"].items():
            figures = (f"{row[key]:.1%}" if row["images"] else "-" for key in ("precision", "recall", "f1"))
            rows.append((name, str(row["images"]), *figures))
        lines = aligned(rows)
        lines.append(f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%} of {self.count} images")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write evaluation.json, predictions.csv and confusion.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.to_dict(), folder / "evaluation.json")
        write_rows([["true \\ predicted", *self.classes], *self._confusion_rows()], folder / "confusion.csv")
        write_rows(
            [["image", "true", "predicted", "probability"], *self._prediction_rows()], folder / "predictions.csv"
        )

    def _confusion_rows(self) -> list[list[Any]]:
        return [[name, *counts] for name, counts in zip(self.classes, self.confusion.tolist(), strict=True)]

    def _prediction_rows(self) -> list[list[Any]]:
        best = self.predictions.probabilities().max(1)
        columns = (
            self.predictions.names,
            self.predictions.labels.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
        )
        return [[name, self.classes[t], self.classes[p], f"{q:.6f}"] for name, t, p, q in zip(*columns, strict=True)]


def evaluate_predictions(
    predictions: Predictions, temperature: float | None = None, resamples: int = 2000, seed: int = 0
) -> Evaluation:
    """Score predictions; with a temperature, calibrated ones too.

    Args:
        resamples, seed: of the bootstrap, behind the intervals that have it.
    """
    logits, labels, k = predictions.logits, predictions.labels, len(predictions.classes)
    per_class: dict[str, Any] = {"num_classes": k, "average": None, "zero_division": 0}
    micro: dict[str, Any] = {"num_classes": k, "average": "micro"}
    recall = multiclass_recall(logits, labels, **per_class)
    confusion = multiclass_confusion_matrix(logits, labels, num_classes=k)
    return Evaluation(
        predictions=predictions,
        top1=multiclass_accuracy(logits, labels, **micro).item(),
        top5=multiclass_accuracy(logits, labels, top_k=min(5, k), **micro).item(),
        # torchmetrics' own mean takes a class without images for one that is never found, if it was predicted
        balanced_accuracy=recall[confusion.sum(1) > 0].double().mean().item(),
        macro_f1=multiclass_f1_score(logits, labels, num_classes=k, average="macro", zero_division=0).item(),
        precision=multiclass_precision(logits, labels, **per_class),
        recall=recall,
        f1=multiclass_f1_score(logits, labels, **per_class),
        confusion=confusion,
        calibration=calibration(logits, labels),
        calibrated=None if temperature is None else calibration(logits, labels, temperature),
        intervals=intervals(predictions.outcomes(), resamples, seed),
    )


def worst_mistakes(predictions: Predictions, count: int) -> list[int]:
    """Indices of the wrongly classified images with the highest probabilities, highest first."""
    best = predictions.probabilities().max(1)
    wrong = (best.indices != predictions.labels).nonzero()[:, 0]
    return wrong[torch.argsort(best.values[wrong], descending=True, stable=True)][:count].tolist()
