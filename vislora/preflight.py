"""python -m vislora.preflight data=imagefolder data.root=pictures [what else the training will be given]

Looks a data set through before a training: files that can't be used or are odd, copies of one picture, also across
splits, labels misspelled, classes and captions that are few or uneven, sizes against the model's input. Writes
preflight.json, and quarantine.txt for `data.quarantine=…`. The exit code is 2 where the data can't be trained on.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config import TrainConfig
from vislora.errors import DataError

if TYPE_CHECKING:
    from vislora.data.images import Facts
    from vislora.data.preflight import Preflight
    from vislora.data.splits import Splits


def preflight(config: TrainConfig) -> Preflight:
    """Look through the data set of a training (from `vislora.compose.configure("preflight", [...])`).

    Every picture is decoded. What was found about files is kept in the cache, so that an interrupted run goes on.

    Raises:
        VisloraError: the data can't even be listed, or a setting can't be used.
    """
    from vislora.data.inspection import inspect_files
    from vislora.data.load import list_files, load_splits
    from vislora.data.preflight import Row, examine, rows_of

    size = _input_size(config)
    data = config.data
    if getattr(data, "root", None) is not None:
        data = replace(data, root=str(Path(data.root).expanduser().absolute()))
    try:
        splits = load_splits(data, config.seed)
    except DataError as error:
        if (listed := list_files(data)) is None:
            raise
        found = inspect_files([path for pairs in listed.values() for path, _ in pairs])
        rows = [
            Row(str(path), split, label, facts=found[path])
            for split, pairs in listed.items()
            for path, label in pairs
            if found[path].usable
        ]
        problems = [facts.problem for facts in found.values() if facts.problem is not None]
        return examine(rows, problems, size, str(error))
    if not splits.facts:
        splits = replace(splits, facts=_facts_in_memory(splits))
    return examine(rows_of(splits), splits.problems, size)


def _input_size(config: TrainConfig) -> int:
    """Pixels of a side of the model's input; the model is built without its weights."""
    import torch

    from vislora.models.vit import build_vit, preprocessing

    with torch.device("meta"):
        return preprocessing(build_vit(replace(config.model, weights="random"), 2)).size


def _facts_in_memory(splits: Splits) -> dict[str, Facts]:
    """Of pictures that don't lie in files of their own."""
    from vislora.data.images import Facts, thumbnail

    def look(part_and_index):
        part, index = part_and_index
        picture = part.image(index)
        return part.names[index], Facts(None, *picture.size, thumbnail(picture))

    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(look, ((part, index) for part in parts for index in range(len(part)))))


def _main(config: TrainConfig, out: Path) -> None:
    from vislora.data.quarantine import write_quarantine
    from vislora.files import write_json
    from vislora.report.preflight import summary

    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything
    found = preflight(config)
    out.mkdir(parents=True, exist_ok=True)
    write_json(found.to_dict(), out / "preflight.json")
    root = Path(config.data.root).expanduser().absolute() if getattr(config.data, "root", None) else None
    quarantine = None
    if found.leave_out and hasattr(config.data, "quarantine"):
        quarantine = out / "quarantine.txt"
        write_quarantine(found.leave_out, root, quarantine)
    print(summary(found, root, quarantine))
    print(f"\nall of it: {out / 'preflight.json'}")
    if not found.usable:
        raise DataError(found.error)


if __name__ == "__main__":
    command("preflight", _main)
