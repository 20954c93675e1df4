"""Files that are either whole or not there: written beside the target, then moved onto it."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from vislora.errors import AdapterError, ConfigError
from vislora.paths import user_path

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = "config.yaml"  # what a training and an evaluation write into their folder before anything else
METRICS = "metrics.jsonl"  # what a training writes into its folder from the first step on


def write_json(value: Any, path: Path) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def read_json(path: Path) -> Any:
    """The value in a JSON file; None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 text, atomically; bytes of a file's name that are no UTF-8 become JSON's escapes."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_rows(rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Write a CSV table, atomically; as `write_text` has names that are no UTF-8."""
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows(rows)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically; the same tensors and metadata are the same bytes."""
    from safetensors.torch import save_file  # here, so that what only writes text needn't wait for torch

    with replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
        part.chmod(mode)  # safetensors 0.8 lets nobody but the owner read what it writes
        if metadata:
            _sort_metadata(part)


def _sort_metadata(file: Path) -> None:
    """Put the metadata in order, which safetensors writes in another one each time."""
    with file.open("rb+") as data:
        size = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:  # as it is, unless another version of safetensors writes JSON in another way
            data.seek(8)
            data.write(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside the path to write to, which is moved onto it afterwards; after an error nothing is left of it, and
    a machine that loses its power leaves the old file or the new one. Several processes may write the same path, on
    several machines too, where their numbers may be the same."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with naming(path):
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Meanwhile what the system refuses, as where the disk is full, is an OSError that names the path: writing to an
    open file tells a number alone, and safetensors has a class of its own."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        # the second is how safetensors before 0.8 has it
        if (found := re.search(r"\((?:os error |.*\bcode: )(\d+)\b", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def reserve(path: Path, size: int) -> None:
    """Take the disk space of a file of so many bytes, which is going to be mapped: where space is missing, writing to
    the map would kill the process.

    Raises:
        OSError: there isn't as much.
    """
    left = shutil.disk_usage(path.parent).free
    if size > left:  # a file system that can't reserve would write zeros until it is full
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB are needed, {left / 1e9:.1f} GB are left", str(path))
    with naming(path), path.open("ab") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of a file system that reserves nothing
                    raise


def check_there(given: Iterable[tuple[str, str | None]]) -> None:
    """Refuse files and folders that aren't there, before torch is imported, which takes seconds.

    Args:
        given: settings and what is given for them, if anything.

    Raises:
        ConfigError: one isn't there.
    """
    for key, path in given:
        if path is not None and not user_path(path).exists():
            raise ConfigError(f"{key}={path}: there is no such file or folder")


def free(out: str) -> Path:
    """The place to write to; an empty folder is free.

    Raises:
        ConfigError: something is there that writing would touch.
    """
    path = user_path(out)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ConfigError(f"out={out} is there already; choose another place")
    return path


def check_no_run(folder: Path) -> None:
    """Refuse a run's folder, where what it exported is wanted.

    Raises:
        AdapterError: a training has written into the folder.
    """
    if not (folder / METRICS).is_file():
        return
    if parts := [str(path) for name in ("adapter", "model") if (path := folder / name).is_dir()]:
        raise AdapterError(f"{folder} is a run's folder; give {' or '.join(parts)}")
    raise AdapterError(
        f"{folder} is the folder of a run that has exported nothing yet; trainer.resume={folder} trainer.stop_at=1, "
        "added to its command, exports what it had reached"
    )


def holds_checkpoint(folder: Path) -> bool:
    """Whether a training has left a checkpoint in the folder to go on from."""
    return any(folder.glob("checkpoints/step_*"))


def check_unused(folder: Path, otherwise: str = "") -> None:
    """Refuse a folder whose files would be overwritten in part, and the rest shown beside the new ones.

    Args:
        otherwise: what else than choosing another folder may be done.

    Raises:
        ConfigError: a training or an evaluation has written into it.
    """
    if (folder / SETTINGS).is_file():
        raise ConfigError(
            f"{folder} holds a training or an evaluation already; choose another folder, as with hydra.run.dir=FOLDER"
            f"{otherwise}"
        )


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
