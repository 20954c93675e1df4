"""What a recognizer says about a labelled split, and how good that is."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vislora.data.images import scaled
from vislora.data.labels import class_name
from vislora.data.splits import ImageSplit
from vislora.errors import DataError
from vislora.inference import Inference
from vislora.metrics.recognition import Evaluation, Mistake, Predictions, evaluate_predictions, worst_mistakes
from vislora.recognizer import Recognizer


def evaluate_split(recognizer: Recognizer, split: ImageSplit, inference: Inference) -> Evaluation:
    """Score a split whose classes are among the recognizer's, matched by name; each image counts once, whatever the
    number of processes.

    Raises:
        DataError: the split has a class the recognizer doesn't know.
    """
    predictions = predict_split(recognizer, split, inference)
    return replace(evaluate_predictions(predictions), mistakes=show_mistakes(predictions, split, 24))


def predict_split(recognizer: Recognizer, split: ImageSplit, inference: Inference) -> Predictions:
    """What the recognizer says about every image of a split.

    Raises:
        DataError: the split has a class the recognizer doesn't know.
    """
    labels = labels_among(recognizer.classes, split)
    logits, speed = inference.outputs(recognizer.model, split, recognizer.preprocessing)
    return Predictions(recognizer.classes, logits, labels, list(split.names), speed)


def labels_among(classes: Sequence[str], split: ImageSplit) -> Tensor:
    """The split's labels as indices into a recognizer's classes, matched by name, [N].

    Raises:
        DataError: the split has a class the recognizer doesn't know.
    """
    column = {class_name(name): k for k, name in enumerate(classes)}
    names = [class_name(name) for name in split.classes]
    if unknown := [name for name in names if name not in column]:
        raise DataError(
            f"class {unknown[0]!r} of the data is unknown to the adapter, whose classes are "
            f"{', '.join(classes[:8])}{', …' if len(classes) > 8 else ''}; leave its pictures out, or train with them"
        )
    return torch.tensor([column[names[label]] for label in split.labels])


def show_mistakes(predictions: Predictions, split: ImageSplit, count: int) -> list[Mistake]:
    """The most confident mistakes, each with its picture."""
    best = predictions.probabilities().max(1)
    names = predictions.classes
    return [
        Mistake(
            name=predictions.names[i],
            true=names[predictions.labels[i]],
            predicted=names[best.indices[i]],
            probability=best.values[i].item(),
            picture=scaled(split.image(i), 192),
        )
        for i in worst_mistakes(predictions, count)
    ]
