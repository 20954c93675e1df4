"""A CSV table of pictures and labels."""

import os
from collections.abc import Iterator
from pathlib import Path

from vislora.config.data import CsvData
from vislora.data.labels import class_name
from vislora.data.quarantine import Labelled, leave_out
from vislora.data.rows import by_number, check_faults, csv_table, file_named
from vislora.data.splits import SPELLINGS, Splits, splits_of_files
from vislora.errors import DataError
from vislora.paths import user_path

_NAMES = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}


def image_table(config: CsvData) -> Splits:
    """Read the table; files that can't be decoded are left out and named in `problems`.

    Raises:
        DataError: the table, one of its columns, a picture or a label is missing, a split has another name than train,
            val or test, a picture is in two splits, or a class isn't in train.
    """
    root = user_path(config.root)
    files, table = list_table(config), root / config.table
    if not files:
        raise DataError(f"{table} has no row below its heading; it needs one for each picture")
    classes = tuple(sorted({label for _, label in files.get("train", [])}, key=by_number))
    if not classes:
        raise DataError(
            f"{table} has no row of train, from which the classes are told; to evaluate on all of it call that split "
            "train, and give split=train"
        )
    files, left_out = leave_out(files, config.quarantine, root)
    return splits_of_files(files, classes, left_out)


def list_table(config: CsvData) -> Labelled:
    """The pictures by split, with the names of their classes, whatever is in them.

    Raises:
        DataError: the table, one of its columns, a picture or a label is missing, a split has another name than train,
            val or test, or a picture is in two splits; faulty rows are told together.
    """
    root = user_path(config.root)
    table = root / config.table
    files: dict[str, list[tuple[Path, str]]] = {}
    split_of: dict[Path, str] = {}
    spelled: dict[str, Path] = {}
    faults: list[str] = []
    for where, cells in _rows(table, config, faults):
        path = file_named(root, cells["image"].replace("\\", "/"))  # as Windows writes them
        path = spelled.setdefault(os.path.abspath(path), path)  # one name, or sub/../a.jpg would be a copy of a.jpg
        if (fault := _fault(cells, path, split_of)) is not None:
            faults.append(f"{where}: {fault}")
            continue
        split = split_of[path] = _NAMES[cells["split"].lower()]
        files.setdefault(split, []).append((path, class_name(cells["label"])))
    check_faults(table, faults)
    return files


def _fault(cells: dict[str, str], path: Path, split_of: dict[Path, str]) -> str | None:
    """What is wrong with a row, given the splits of the pictures in the rows before it."""
    if not cells["image"]:
        return "the image is empty"
    if not cells["label"]:
        return "the label is empty"
    if not os.path.isfile(path):  # Path's own raises over a very long cell
        return f"{path} is missing; paths are relative to data.root"
    if (split := _NAMES.get(cells["split"].lower())) is None:
        return f"split is {cells['split']!r}; expected train, val or test"
    if split_of.get(path, split) != split:
        return f"{path} is in {split_of[path]} already, and must not be in {split} too"
    return None


def _rows(table: Path, config: CsvData, faults: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row stands, and what it has under image, label and split; without a column of splits all is train.
    `faults` as in `csv_table`."""
    if not table.is_file():
        raise DataError(f"data.table: {table} is missing")
    columns = {"image": config.image_column, "label": config.label_column}
    there, rows = csv_table(table, faults)
    if split_column := config.split_column or ("split" if "split" in there else None):
        columns["split"] = split_column
    for key, column in columns.items():
        if column not in there:
            has = ", ".join(there) or "none"
            raise DataError(f"{table} has no column {column!r} (data.{key}_column); it has {has}")
    for where, row in rows:
        cells = {key: (row[name] or "").strip() for key, name in columns.items()}  # None where a line is short
        yield where, {"split": "train"} | cells
