"""Text files of rows, as spreadsheets and scripts write them: JSON lines, CSV, plain lines."""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from vislora.errors import DataError

Row = dict[str, Any]


def csv_table(file: Path, faults: list[str]) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    """A table's columns, and its rows: where each stands, for messages, and its cells by column; None in those that a
    short row leaves out. Columns are parted by what the first line has most of: commas, semicolons (a spreadsheet's
    where a comma is the decimal point) or tabs.

    Args:
        faults: gets, while rows are taken, what is wrong with those that are longer than the first line, which are
            passed over, and with one that isn't CSV, which is the last; for `check_faults`.

    Raises:
        DataError: the file is missing or not in UTF-8, its first line isn't CSV, or two columns have one name.
    """
    lines = text_lines(file)
    delimiter = max(",;\t", key=re.sub(r'"[^"]*"', "", lines[0]).count)
    reader = csv.DictReader((f"{line}\n" for line in lines), strict=True, delimiter=delimiter)
    try:
        columns = list(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(f"{file}, the row from line 1 on: {error}") from None
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise DataError(f"{file} has two columns {twice[0]!r}; take one out")

    def rows() -> Iterator[tuple[str, Row]]:
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if any(row.pop(None, ())):
                    faults.append(
                        f"{where} has more cells than the first line; put a cell with {delimiter!r} in quotes"
                    )
                else:
                    yield where, row
        except csv.Error as error:
            faults.append(f"{file}, the row from line {reader.line_num + 1} on: {error}")

    return columns, rows()


def check_faults(file: Path, faults: Sequence[str]) -> None:
    """Refuse a table in which rows are faulty, each told with the file and its line first.

    Raises:
        DataError: there is a fault; the first three are told.
    """
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        told = "; ".join(fault.removeprefix(f"{file}, ") for fault in faults[:3])
        raise DataError(f"{file} has {len(faults)} faulty rows{', the first three' * (len(faults) > 3)}: {told}")


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each line stands that isn't blank, for messages, and the JSON value in it.

    Raises:
        DataError: the file is missing or not in UTF-8, or a line isn't JSON.
    """
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
            raise DataError(f"{where} isn't JSON: {error}") from None


def text_lines(file: Path) -> list[str]:
    """The lines of a text file. U+2028 and its like, which JSON leaves as they are within a text, end none.

    Raises:
        DataError: it is missing or isn't in UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{file} is missing") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} isn't text in UTF-8, as which it is to be saved: {error}") from None


def file_named(folder: Path, name: PurePath | str) -> Path:
    """The file that a table names, there or not: tables are typed with accented letters as one character (NFC), where
    names of files that come from macOS may have letter and accent apart (NFD), and the other way round."""
    if str(name).isascii() or os.path.exists(folder / name):  # Path's own raises over long names
        return folder / name
    for part in PurePath(name).parts:
        spelled = (folder / spelling for spelling in (part, *(unicodedata.normalize(f, part) for f in ("NFC", "NFD"))))
        folder = next((path for path in spelled if os.path.exists(path)), folder / part)
    return folder


def by_number(label: str) -> tuple[int, str]:
    """What labels are ordered by: those that are numbers by their value, others before them."""
    return (int(label) if is_number(label) else -1, label)


def is_number(label: str) -> bool:
    """Whether a label is a whole number in digits, as an index of a class is."""
    return label.isascii() and label.isdigit()
