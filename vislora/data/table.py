"""A CSV table of pictures and labels."""

import csv
from pathlib import Path

from vislora.config import CsvData
from vislora.data.folder import checked_splits
from vislora.data.splits import Splits
from vislora.errors import DataError

_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def image_table(config: CsvData) -> Splits:
    """Read the table; files that can't be decoded are left out and named in `problems`.

    Raises:
        DataError: the table, one of its columns, a picture or a label is missing, a split has another name than train,
            val or test, or a class isn't in train.
    """
    root = Path(config.root)
    table = root / config.table
    if not table.is_file():
        raise DataError(f"data.table: {table} is missing")
    files: dict[str, list[tuple[Path, str]]] = {}
    with table.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        wanted = [config.image_column, config.label_column] + ([config.split_column] if config.split_column else [])
        if lacking := [column for column in wanted if column not in (rows.fieldnames or [])]:
            raise DataError(f"{table} has no column {lacking[0]!r}; it has {', '.join(rows.fieldnames or ['none'])}")
        for row in rows:
            where = f"{table}, line {rows.line_num}"
            path, label = root / (row[config.image_column] or ""), (row[config.label_column] or "").strip()
            if not label:
                raise DataError(f"{where}: the label is empty")
            if not path.is_file():
                raise DataError(f"{where}: {path} is missing")
            split = (row[config.split_column] or "").strip().lower() if config.split_column else "train"
            if split not in _NAMES:
                raise DataError(f"{where}: split is {split!r}; train, val or test was expected")
            files.setdefault(_NAMES[split], []).append((path, label))
    classes = tuple(sorted({label for _, label in files.get("train", [])}))
    if len(classes) < 2:
        raise DataError(f"{table} has {len(classes)} classes to train on; at least two are needed")
    for rows_of_split in files.values():
        for path, label in rows_of_split:
            if label not in classes:
                raise DataError(f"{table}: class {label!r} of {path} isn't among the training pictures'")
    return checked_splits(files, classes)
