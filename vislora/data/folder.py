"""Class folders: root/{train,val,test}/CLASS/*, or root/CLASS/* alone."""

from pathlib import Path

from vislora.config import ImageFolderData
from vislora.data.images import Problem, check_images
from vislora.data.splits import Files, ImageSplit, Splits
from vislora.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def image_folder(config: ImageFolderData) -> Splits:
    """Read the tree; files that can't be decoded are left out and named in `problems`.

    Raises:
        DataError: no such folder, fewer than two classes, a class without a usable picture to train on, or a class that
            training doesn't know.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root={root}: no such folder")
    folders = {name: _first_folder(root, spellings) for name, spellings in _SPLITS.items()}
    if folders["train"] is None:
        folders = {"train": root, "val": None, "test": None}
    classes = tuple(sorted(d.name for d in folders["train"].iterdir() if d.is_dir() and not d.name.startswith(".")))
    if len(classes) < 2:
        raise DataError(
            f"{folders['train']} holds {len(classes)} class folders, at least two are needed: "
            "root/CLASS/*.jpg, or root/train/CLASS/*.jpg with val and test beside train"
        )
    files = {name: _labelled_files(folder, classes) for name, folder in folders.items() if folder is not None}
    return checked_splits(files, classes)


def checked_splits(files: dict[str, list[tuple[Path, str]]], classes: tuple[str, ...]) -> Splits:
    """Splits of (file, class name) lists, without the files that can't be decoded.

    Raises:
        DataError: a class without a usable picture to train on.
    """
    problems: list[Problem] = []
    splits: dict[str, ImageSplit] = {}
    for name, rows in files.items():
        found = check_images([path for path, _ in rows])
        problems += found
        unusable = {problem.file for problem in found if not problem.usable}
        rows = [(path, label) for path, label in rows if path not in unusable]
        paths = [path for path, _ in rows]
        labels = [classes.index(label) for _, label in rows]
        if rows:
            splits[name] = ImageSplit(classes, labels, [str(path) for path in paths], Files(paths))
    present = set(splits["train"].labels) if "train" in splits else set()
    if absent := [name for k, name in enumerate(classes) if k not in present]:
        left_out = f" ({sum(not p.usable for p in problems)} unreadable files were left out)" if problems else ""
        raise DataError(f"class {absent[0]!r} has no usable picture to train on{left_out}")
    return Splits(splits["train"], splits.get("val"), splits.get("test"), problems)


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _labelled_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, str]]:
    rows = []
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        if child.name not in classes:
            raise DataError(f"{child}: class {child.name!r} is unknown to the training split, which has {list(classes)}")
        rows += [(path, child.name) for path in sorted(child.rglob("*")) if path.suffix.lower() in SUFFIXES]
    return rows
