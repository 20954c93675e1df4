"""python -m vislora.predict adapter=runs/…/adapter IMAGE …

Prints the most probable classes of each image.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vislora.compose import command, quoted
from vislora.config import Precision, PredictConfig
from vislora.errors import ConfigError


def predict(config: PredictConfig) -> dict[str, list[tuple[str, float]]]:
    """The `config.top` most probable classes of each image, most probable first, by the image's path.

    Raises:
        VisloraError: a mistake in the settings or the adapter, or an image that can't be read.
    """
    from vislora.data.splits import Files, ImageSplit
    from vislora.inference import Inference
    from vislora.precision import new_accelerator, resolve_precision
    from vislora.recognizer import load_recognizer

    if not config.images:
        raise ConfigError("images=[]: expected at least one file")
    accelerator = new_accelerator(Precision.fp32)
    precision = resolve_precision(config.precision, accelerator.device)
    recognizer = load_recognizer(config.adapter, config.weights)
    recognizer.model.to(accelerator.device)
    unlabelled = [0] * len(config.images)
    split = ImageSplit(recognizer.classes, unlabelled, config.images, Files([Path(path) for path in config.images]))
    inference = Inference(config.batch_size, precision, 0, accelerator)
    logits, _ = inference.outputs(recognizer.model, split, recognizer.preprocessing)
    best = logits.softmax(1).topk(min(config.top, len(recognizer.classes)))
    rankings = zip(config.images, best.values.tolist(), best.indices.tolist(), strict=True)
    return {
        path: [(recognizer.classes[k], p) for k, p in zip(columns, values, strict=True)]
        for path, values, columns in rankings
    }


def _main(config: PredictConfig, _out: Path) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    for path, ranking in predict(config).items():
        print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in ranking))


if __name__ == "__main__":
    images = [
        word for word in sys.argv[1:] if Path(word).is_file() or ("=" not in word and not word.startswith(("-", "~")))
    ]
    rest = [word for word in sys.argv[1:] if word not in images]
    command("predict", _main, [*rest, f"images=[{','.join(map(quoted, images))}]"] if images else rest)
