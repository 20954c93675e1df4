"""python -m vislora.predict adapter=runs/…/adapter IMAGE …

Prints the most probable classes of each image.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vislora.compose import command, quoted
from vislora.config import PredictConfig


def predict(config: PredictConfig) -> dict[str, list[tuple[str, float]]]:
    """The `config.top` most probable classes of each image, most probable first, by the image's path.

    Raises:
        VisloraError: a mistake in the settings or the adapter, or an image that can't be read.
    """
    from vislora.data.images import read_image
    from vislora.recognizer import load_recognizer

    recognizer = load_recognizer(config.adapter, config.weights)
    found: dict[str, list[tuple[str, float]]] = {}
    for start in range(0, len(config.images), config.batch_size):
        paths = config.images[start : start + config.batch_size]
        probabilities = recognizer([read_image(Path(path)) for path in paths])
        best = probabilities.topk(min(config.top, len(recognizer.classes)))
        for path, values, columns in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            found[path] = [(recognizer.classes[k], p) for k, p in zip(columns, values, strict=True)]
    return found


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
