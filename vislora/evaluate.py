"""python -m vislora.evaluate adapter=runs/…/adapter [data=imagefolder data.root=…] [split=test]

Scores an adapter (or a merged or fully tuned model) over a data set; writes evaluation.json, confusion.csv and
confusion.png. Without data=… it is the data set of the training.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config import EvaluateConfig, Precision, data_from_dict
from vislora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vislora.data.splits import ImageSplit
    from vislora.metrics.recognition import Evaluation
    from vislora.recognizer import Recognizer


def evaluate(config: EvaluateConfig, out: Path | None = None) -> Evaluation:
    """Score what `config.adapter` holds over a split; write the figures into `out` if given.

    Raises:
        VisloraError: a mistake in the settings, the data or the adapter.
    """
    from accelerate import Accelerator

    from vislora.data.load import load_splits
    from vislora.precision import resolve_precision
    from vislora.recognizer import load_recognizer

    accelerator = Accelerator(mixed_precision="no")
    recognizer = load_recognizer(config.adapter, config.weights)
    data = config.data if config.data is not None else data_from_dict(recognizer.about["data"])
    splits = load_splits(data, seed=0)
    split = {"train": splits.train, "val": splits.val, "test": splits.test}.get(config.split)
    if split is None:
        there = [name for name in ("train", "val", "test") if getattr(splits, name) is not None]
        raise ConfigError(f"split={config.split}: the data has {', '.join(there)}")
    recognizer.model.to(accelerator.device)
    precision = resolve_precision(config.precision, accelerator.device)
    figures = evaluate_split(recognizer, split, config.batch_size, precision, config.workers, accelerator)
    if out is not None and accelerator.is_main_process:
        figures.write(out)
    return figures


def evaluate_split(
    recognizer: Recognizer,
    split: ImageSplit,
    batch_size: int,
    precision: Precision,
    workers: int,
    accelerator: Accelerator,
) -> Evaluation:
    """Score a split whose classes are among the recognizer's, matched by name; each image counts once, whatever the
    number of processes.

    Raises:
        DataError: the split has a class the recognizer doesn't know.
    """
    import torch
    from accelerate.utils import gather_object

    from vislora.data.order import eval_loader
    from vislora.data.transforms import eval_transform
    from vislora.metrics.recognition import evaluate_probabilities
    from vislora.precision import autocast_dtype

    column = {name: k for k, name in enumerate(recognizer.classes)}
    if unknown := [name for name in split.classes if name not in column]:
        raise DataError(
            f"class {unknown[0]!r} of the data is unknown to the adapter, whose classes are "
            f"{', '.join(recognizer.classes[:8])}{', …' if len(recognizer.classes) > 8 else ''}"
        )
    transform = eval_transform(recognizer.preprocessing)
    loader = eval_loader(split, transform, batch_size, workers, accelerator.process_index, accelerator.num_processes)
    dtype = autocast_dtype(precision)
    mine, since = [], time.perf_counter()
    with torch.inference_mode(), torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None):
        for images, labels, indices in loader:
            probabilities = recognizer.model(images.to(accelerator.device)).float().softmax(1).cpu()
            mine += zip(indices.tolist(), labels.tolist(), probabilities, strict=True)
    rows = sorted(gather_object(mine), key=lambda row: row[0])
    speed = round(len(rows) / (time.perf_counter() - since), 1)
    labels = torch.tensor([column[split.classes[label]] for _, label, _ in rows])
    return evaluate_probabilities(torch.stack([p for _, _, p in rows]), labels, recognizer.classes, speed)


def _main(config: EvaluateConfig, out: Path) -> None:
    figures = evaluate(config, out)
    print(figures.table())
    print(f"{figures.images_per_s:.0f} images/s; figures and confusion matrix: {out}")


if __name__ == "__main__":
    command("evaluate", _main)
