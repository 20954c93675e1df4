"""Scores of a classifier over a data set, by torchmetrics."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from vislora.files import write_json


@dataclass(frozen=True)
class Evaluation:
    """Figures over N images and K classes.

    Attributes:
        classes: K names.
        count: N.
        top1, top5: share of images whose class is first, or among the first five (all K where there are fewer).
        precision, recall, f1: [K]; 0 where undefined.
        confusion: [K, K] counts, row: true class, column: predicted.
        images_per_s: of the whole pass, decoding included; None where it wasn't timed.
    """

    classes: tuple[str, ...]
    count: int
    top1: float
    top5: float
    precision: Tensor
    recall: Tensor
    f1: Tensor
    confusion: Tensor
    images_per_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        support = self.confusion.sum(1).tolist()
        return {
            "images": self.count,
            "top1": self.top1,
            "top5": self.top5,
            "images_per_s": self.images_per_s,
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
        wide = max(len(name) for name in self.classes)
        lines = [f"{'':{wide}}  images  precision  recall     F1"]
        for name, row in self.to_dict()["per_class"].items():
            lines.append(
                f"{name:{wide}}  {row['images']:6d}  {row['precision']:9.1%}  {row['recall']:6.1%}  {row['f1']:5.1%}"
            )
        lines.append(f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%} of {self.count} images")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write evaluation.json, confusion.csv and confusion.png."""
        from vislora.report.confusion import draw_confusion

        folder.mkdir(parents=True, exist_ok=True)
        write_json(self.to_dict(), folder / "evaluation.json")
        with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["true \\\\ predicted", *self.classes])
            rows.writerows([name, *counts] for name, counts in zip(self.classes, self.confusion.tolist(), strict=True))
        draw_confusion(self.confusion, self.classes, folder / "confusion.png")


def evaluate_probabilities(
    probabilities: Tensor, labels: Tensor, classes: tuple[str, ...], images_per_s: float | None = None
) -> Evaluation:
    """Score probabilities (or logits) [N, K] against labels [N]."""
    k = len(classes)
    per_class: dict[str, Any] = {"num_classes": k, "average": None, "zero_division": 0}
    micro: dict[str, Any] = {"num_classes": k, "average": "micro"}
    return Evaluation(
        classes=classes,
        count=len(labels),
        top1=multiclass_accuracy(probabilities, labels, **micro).item(),
        top5=multiclass_accuracy(probabilities, labels, top_k=min(5, k), **micro).item(),
        precision=multiclass_precision(probabilities, labels, **per_class),
        recall=multiclass_recall(probabilities, labels, **per_class),
        f1=multiclass_f1_score(probabilities, labels, **per_class),
        confusion=multiclass_confusion_matrix(probabilities, labels, num_classes=k),
        images_per_s=images_per_s,
    )
