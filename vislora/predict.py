"""python -m vislora.predict adapter=runs/…/adapter IMAGE_OR_FOLDER … [top=5] [out=FILE.csv]

Prints the most probable classes of each image, and of all in a folder and below it, or writes them into a .csv or .json
file.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

from hydra._internal.utils import get_args_parser

from vislora.compose import command, quoted
from vislora.config.commands import PredictConfig
from vislora.config.training import Precision
from vislora.files import check_there, free, write_json, write_rows
from vislora.names import printable
from vislora.paths import user_path


def predict(config: PredictConfig) -> dict[str, list[tuple[str, float]]]:
    """The `config.top` most probable classes of each image, most probable first, by the image's path; a folder stands
    for all in it and below it that can be read; the others are named on the standard error stream.

    Raises:
        VisloraError: a mistake in the settings or the adapter, an image given by its own name that can't be read, or a
            folder with none that can.
    """
    check_there([("adapter", config.adapter), *(("images", path) for path in config.images)])

    from vislora.data.captions import usable_pictures
    from vislora.data.splits import Files, ImageSplit
    from vislora.inference import Inference
    from vislora.precision import new_accelerator, resolve_precision
    from vislora.recognizer import check_weights, load_recognizer

    recognizer = load_recognizer(config.adapter, config.weights)  # a mistake here is told before any work
    check_weights(config.weights, config.adapter)
    accelerator = new_accelerator(Precision.fp32)
    paths: list[Path] = []
    for given in map(user_path, config.images):
        pictures, left_out = usable_pictures(given, "images") if given.is_dir() else ([given], [])
        for problem in left_out:
            accelerator.print(printable(f"left out: {problem.what}"), file=sys.stderr)  # which names the file
        paths += pictures
    precision = resolve_precision(config.precision, accelerator.device)
    recognizer.model.to(accelerator.device)
    names = [str(path) for path in paths]
    split = ImageSplit(recognizer.classes, [0] * len(paths), names, Files(paths))
    inference = Inference(config.batch_size, precision, 0, accelerator)
    logits, _ = inference.outputs(recognizer.model, split, recognizer.preprocessing)
    best = logits.softmax(1).topk(min(config.top, len(recognizer.classes)))
    rankings = zip(names, best.values.tolist(), best.indices.tolist(), strict=True)
    return {
        name: [(recognizer.classes[k], p) for k, p in zip(columns, values, strict=True)]
        for name, values, columns in rankings
    }


def _main(config: PredictConfig, _out: Path) -> None:
    out = None if config.out is None else free(config.out)
    rankings = predict(config)

    from accelerate import PartialState

    if out is not None:
        if PartialState().is_main_process:
            _write(rankings, out)
            print(f"{len(rankings)} pictures: {out}")
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    for path, ranking in rankings.items():
        PartialState().print(printable(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in ranking)))


def _write(rankings: dict[str, list[tuple[str, float]]], out: Path) -> None:
    """A row for each class of each image, most probable first; in JSON by image."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        write_json(
            {path: [{"class": name, "probability": p} for name, p in top] for path, top in rankings.items()}, out
        )
        return
    rows = [[path, place, *one] for path, top in rankings.items() for place, one in enumerate(top, 1)]
    write_rows([["image", "place", "class", "probability"], *rows], out)


def _divided(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are pictures or folders, and the others: settings, options of Hydra, and the values of those."""
    images, rest = [], []
    options = get_args_parser()._actions
    with_value = {name for option in options if option.nargs != 0 for name in option.option_strings}  # as --cfg job
    for before, word in pairwise(["", *words]):
        # Path's own exists() raises over a very long list
        is_image = os.path.exists(word) or ("=" not in word and not word.startswith(("-", "~")))
        (images if is_image and before not in with_value else rest).append(word)
    return images, rest


if __name__ == "__main__":
    images, rest = _divided(sys.argv[1:])
    command("predict", _main, [*rest, f"images=[{','.join(map(quoted, images))}]"] if images else rest)
