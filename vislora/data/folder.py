"""Class folders: root/{train,val,test}/CLASS/**, or root/CLASS/** alone; the splits in any case.

Names that begin with a dot are hidden, as systems and notebooks leave them beside pictures (._a.jpg, .thumbnails/,
.ipynb_checkpoints/): such a folder is no class, and what is in it isn't read.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from vislora.config.data import ImageFolderData
from vislora.data.images import FORMATS, Problem
from vislora.data.labels import class_name
from vislora.data.quarantine import Labelled, leave_out
from vislora.data.splits import SPELLINGS, Splits, splits_of_files
from vislora.errors import DataError
from vislora.paths import user_path

SUFFIXES = tuple(FORMATS)


def image_folder(config: ImageFolderData) -> Splits:
    """Read the tree; files that can't be decoded or aren't named as pictures, and pictures in no class folder, are left
    out, and named in `problems`.

    Raises:
        DataError: no such folder, no class in it, a class without a usable picture to train on, a class that
            training doesn't know, or a split without any picture.
    """
    root = user_path(config.root)
    folders = split_folders(root)
    own = _subfolders(folders["train"])
    classes = tuple(class_name(folder.name) for folder in own)
    if not classes:
        taken = folders["train"] != root and any(_is_picture(path) for path in folders["train"].iterdir())
        what = "pictures, and is taken for a split by its name" if taken else "no class folder"
        raise DataError(
            f"{folders['train']} holds {what}; pictures lie in root/CLASS/*.jpg, or in root/train/CLASS/*.jpg with val "
            "and test beside train"
        )
    for child in (child for folder in folders.values() for child in _subfolders(folder)):
        if class_name(child.name) not in classes:
            raise DataError(f"{child}: class {child.name!r} is unknown to train, which has {', '.join(classes)}")
    files = list_folder(config)
    shown = {label for _, label in files["train"]}
    if empty := [folder for folder, name in zip(own, classes, strict=True) if name not in shown]:
        raise DataError(f"{empty[0]} holds no picture ({' '.join(SUFFIXES)}); put some there, or take the folder away")
    if vacant := [folders[name] for name, pairs in files.items() if not pairs]:
        raise DataError(f"{vacant[0]} holds no picture in a class folder; put some there, or take the folder away")
    below = [*files_below(root)]
    aside = [*pictures_aside(below, files, "lies in no class folder"), *lost_links(below)]
    class_folders = {child for folder in folders.values() for child in _subfolders(folder)}
    otherwise = others(path for path in below if not class_folders.isdisjoint(path.parents))
    files, left_out = leave_out(files, config.quarantine, root)
    splits = splits_of_files(files, classes, left_out)
    return replace(splits, problems=[*splits.problems, *aside, *otherwise])


def list_folder(config: ImageFolderData) -> Labelled:
    """The pictures by split, with the names of their classes, whatever is in them.

    Raises:
        DataError: no such folder, or none to train on.
    """
    folders = split_folders(user_path(config.root))
    return {name: _labelled_files(folder) for name, folder in folders.items()}


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits there are; root alone where it holds the classes."""
    if not root.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    found: dict[str, Path] = {}
    for name, spellings in SPELLINGS.items():
        if folders := [folder for folder in _subfolders(root) if folder.name.lower() in spellings]:
            if len(folders) > 1:
                raise DataError(f"{folders[0]} and {folders[1]} are one split by two names; put them together")
            found[name] = folders[0]
    if found and "train" not in found:
        one = next(iter(found.values()))
        raise DataError(
            f"{root} holds {', '.join(f.name for f in found.values())} but no train folder; what is to be evaluated "
            f"alone is data.root={one} with split=train"
        )
    return found or {"train": root}


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and below it, hidden ones aside; also behind links to folders, each folder once.

    Raises:
        OSError: a folder can't be read.
    """
    return sorted(filter(_is_picture, files_below(folder)))


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and below it, not in hidden folders; also behind links to folders, each folder once.

    Raises:
        OSError: a folder can't be read.
    """
    # a link to a folder above would bring in all other classes as pictures of this one
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_give_up):
        if (real := os.path.realpath(where)) in seen:  # as in a circle of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (Path(where, name) for name in files)


def lost_links(files: Iterable[Path]) -> list[Problem]:
    """Of these files the links to pictures that lead nowhere, as where a data set was fetched in part."""
    lost = [path for path in files if _is_named_so(path) and path.is_symlink() and not path.exists()]
    return [
        Problem(path, f"{path} leads to {os.readlink(path)}, which is missing", usable=False, kinds=("missing",))
        for path in sorted(lost)
    ]


def pictures_aside(
    below: Iterable[Path], files: Mapping[str, Iterable[tuple[Path, object]]], why: str
) -> list[Problem]:
    """The pictures among the files below a data set's root that are in no split of its own files, each with why."""
    known = {os.path.abspath(path) for pairs in files.values() for path, _ in pairs}
    others = sorted(path for path in below if os.path.abspath(path) not in known and _is_picture(path))
    linked = {os.path.realpath(path) for path in known} if others else set()
    return [
        Problem(path, f"{path} {why}", usable=False, kinds=("aside",))
        for path in others
        if os.path.realpath(path) not in linked
    ]


def others(files: Iterable[Path]) -> list[Problem]:
    """Of these files those that aren't named as pictures, hidden ones aside."""
    return [
        Problem(path, f"{path} hasn't the suffix of a picture", usable=False, kinds=("other",))
        for path in sorted(files)
        if not _is_named_so(path) and not path.name.startswith(".")
    ]


def _give_up(error: OSError) -> NoReturn:
    raise error  # os.walk alone would pass over the folder, and over all pictures in it


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name))


def _labelled_files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, class_name(child.name)) for child in _subfolders(folder) for path in pictures_below(child)]


def _is_hidden(name: str) -> bool:
    """Whether a folder holds what systems keep for themselves, as macOS does in the archives that it makes."""
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(path: Path) -> bool:
    return _is_named_so(path) and path.is_file()


def _is_named_so(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
