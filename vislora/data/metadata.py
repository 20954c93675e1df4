"""metadata.jsonl or metadata.csv beside pictures, in the form of Hugging Face's image folders: {"file_name": …, …} a
line, or a column file_name and others.

The table comes from anywhere: a name in it never leads out of its folder.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vislora.config.data import MetadataData
from vislora.data.folder import files_below, lost_links, pictures_aside, split_folders
from vislora.data.labels import class_name
from vislora.data.quarantine import Labelled, leave_out
from vislora.data.rows import by_number, check_faults, csv_table, file_named, json_lines
from vislora.data.splits import Splits, splits_of_files
from vislora.errors import DataError
from vislora.paths import user_path

METADATA = ("metadata.jsonl", "metadata.csv")


def metadata_folder(config: MetadataData) -> Splits:
    """Labelled pictures: root/{train,val,test}/metadata.jsonl (or .csv), or root/metadata.jsonl alone; files that
    can't be decoded, links that lead nowhere and pictures that no table lists are left out, and named in `problems`.

    Raises:
        DataError: a folder, table, picture or label is missing or malformed, a name leads out of the folder, or a class
            isn't in train.
    """
    files = list_metadata(config)
    classes = tuple(sorted({label for _, label in files["train"]}, key=by_number))
    if not classes:
        raise DataError(f"{config.root} has a metadata table without a row; list the pictures and their labels in it")
    root = user_path(config.root)
    below = [*files_below(root)]
    aside = [*pictures_aside(below, files, f"is in no {' or '.join(METADATA)}"), *lost_links(below)]
    files, left_out = leave_out(files, config.quarantine, root)
    splits = splits_of_files(files, classes, left_out)
    return replace(splits, problems=[*splits.problems, *aside])


def list_metadata(config: MetadataData) -> Labelled:
    """The pictures by split, with the names of their classes, whatever is in them.

    Raises:
        DataError: a folder, table, picture or label is missing or malformed, or a name leads out of the folder.
    """
    files: Labelled = {}
    for split, folder in split_folders(user_path(config.root)).items():
        pairs = files.setdefault(split, [])
        for where, path, row in metadata_rows(folder):
            if config.label_key not in row:
                raise DataError(f"{where} has no {config.label_key!r} (data.label_key); it has {', '.join(row)}")
            label = row[config.label_key]
            label = label.strip() if isinstance(label, str) else label  # as in other tables
            if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                raise DataError(f"{where}: {config.label_key!r} is {label!r}; expected a class's name or number")
            pairs.append((path, class_name(str(label))))
    return files


def metadata_table(folder: Path) -> Path | None:
    """The folder's table; None where it has none.

    Raises:
        DataError: there are two.
    """
    there = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(there) > 1:
        raise DataError(f"{there[0]} and {there[1]} both list pictures; keep one")
    return there[0] if there else None


def metadata_rows(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Each row of the folder's table: where it stands, the picture it is about, and what it says.

    Raises:
        DataError: the table is missing, malformed or not in UTF-8, or a picture is missing or outside of the folder.
    """
    if (table := metadata_table(folder)) is None:
        raise DataError(f"{folder / METADATA[0]} is missing, and so is {METADATA[1]}")
    faults: list[str] = []
    for where, row in json_lines(table) if table.suffix == ".jsonl" else csv_table(table, faults)[1]:
        told = row.get("file_name") if isinstance(row, dict) else None
        name = PurePosixPath(told.replace("\\", "/") if isinstance(told, str) else "")
        if not name.name:  # as of "" and "."
            expected = '{"file_name": "…", …}' if table.suffix == ".jsonl" else "a name in the column file_name"
            raise DataError(f"{where}: expected {expected}")
        if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
            raise DataError(f"{where}: {told!r} leads out of the folder")
        path = file_named(folder, name)
        if not os.path.isfile(path):  # Path's own raises over a very long name
            raise DataError(f"{where}: {path} is missing")
        yield where, path, row
    check_faults(table, faults)
