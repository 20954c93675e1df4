"""Public data sets: the classification sets of torchvision, CUB-200-2011, and the Hugging Face hub's."""

import inspect
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torchvision.datasets
from PIL import Image
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from vislora.config.data import Cub200Data, HfData, TorchvisionData
from vislora.data.cache import content_key
from vislora.data.images import Problem, upright_rgb
from vislora.data.quarantine import Labelled, leave_out
from vislora.data.splits import SPELLINGS, ImageSplit, Splits, splits_of_files
from vislora.errors import DataError
from vislora.files import sha256
from vislora.hub import offline_if_unreachable
from vislora.paths import cache_dir, user_path

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"

_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = _TWO | {"val": {"split": "val"}}
_WITHOUT_TEST = {"train": {"split": "train"}, "val": {"split": "val"}}
_WHOLE: dict[str, dict] = {"train": {}}

# The arguments that choose each split. To add a set: a row here, if its items are (picture, class index) pairs.
_TORCHVISION: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": _TWO | {"val": {"split": "valid"}},
    "DTD": _THREE,
    "EuroSAT": _WHOLE,
    "FER2013": {"train": {"split": "train"}},  # one of its editions has no labels for the test pictures
    "FGVCAircraft": _THREE,
    "FashionMNIST": _FLAG,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "GTSRB": _TWO,
    "ImageNet": _WITHOUT_TEST,
    "Imagenette": _WITHOUT_TEST,
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "RenderedSST2": _THREE,
    "SEMEION": _WHOLE,
    "STL10": _TWO,
    "SUN397": _WHOLE,
    "SVHN": _TWO,
    "StanfordCars": _TWO,
    "USPS": _FLAG,
}


def torchvision_set(config: TorchvisionData) -> Splits:
    """A set with the splits it has, from `config.root` or the cache, downloaded where it isn't there.

    Raises:
        DataError: an unknown set, or files that are neither there nor can be downloaded.
    """
    if config.name not in _TORCHVISION:
        raise DataError(
            f"data.name={config.name} is no classification set of torchvision; there are {', '.join(_TORCHVISION)}"
        )
    root = user_path(config.root) if config.root else cache_dir() / "torchvision" / config.name
    splits = {}
    for split, arguments in _TORCHVISION[config.name].items():
        dataset = _find(config.name, root, arguments, config.download)
        splits[split] = _labelled(dataset, f"{config.name}/{split}")
    return Splits(**splits)


def cub200(config: Cub200Data) -> Splits:
    """CUB-200-2011 (Wah et al. 2011), with its own split of 5,994 pictures to train on and 5,794 to test.

    It is looked for in `config.root`/CUB_200_2011, then as the archive CUB_200_2011.tgz beside that, then downloaded.

    Raises:
        DataError: the files are not there and can't be downloaded, or are damaged.
    """
    root = user_path(config.root) if config.root else cache_dir() / "cub200"
    folder, archive = root / "CUB_200_2011", root / "CUB_200_2011.tgz"
    if not folder.is_dir():
        _fetch(archive, config.download)
        _unpack(archive, folder)
    classes = {key: name.partition(".")[2].replace("_", " ") for key, name in _column(folder / "classes.txt").items()}
    labels, training = _column(folder / "image_class_labels.txt"), _column(folder / "train_test_split.txt")
    files: Labelled = {"train": [], "test": []}
    try:
        for key, name in _column(folder / "images.txt").items():
            files["train" if training[key] == "1" else "test"].append((folder / "images" / name, classes[labels[key]]))
    except KeyError as key:
        raise DataError(f"the tables in {folder} don't fit together at {key}; delete it to unpack it again") from None
    files, left_out = leave_out(files, config.quarantine, root)
    return splits_of_files(files, tuple(classes.values()), left_out)


def hub_set(config: HfData) -> Splits:
    """An image classification set of the Hugging Face hub with the splits it has; one without labels is left out, and
    those called otherwise are named in `problems`.

    Raises:
        DataError: the `datasets` package is missing, the set is out of reach, lacks a column or has no train split.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("data=hf needs the datasets package: pip install datasets") from None
    if not Path(config.name).is_dir():
        offline_if_unreachable()
        datasets.config.HF_HUB_OFFLINE |= huggingface_hub.constants.HF_HUB_OFFLINE  # of which it has a copy
    try:
        parts = datasets.load_dataset(config.name, config.subset)
    except Exception as error:  # the package documents no common class
        because = " ".join(str(error).split()) or type(error).__name__
        if datasets.config.HF_HUB_OFFLINE:
            because += "; without the hub it has to be in the cache, from a run where there is a network, or a folder"
        raise DataError(f"data.name={config.name} can't be loaded: {because}") from error
    splits: dict[str, ImageSplit] = {}
    problems: list[Problem] = []
    others = dict.fromkeys(parts)
    for name, spellings in SPELLINGS.items():
        if there := [spelling for spelling in spellings if spelling in parts]:
            del others[there[0]]
            split, unlabelled = _hub_split(parts[there[0]], there[0], config)
            if split.labels:  # or they are withheld, as of many sets' test split
                splits[name] = split
                problems += [
                    Problem(Path(row), f"{row} has no label", usable=False, kinds=("unlabelled",)) for row in unlabelled
                ]
    problems += [Problem(Path(name), f"{name} isn't read", usable=False, kinds=("split",)) for name in others]
    if "train" not in splits:
        raise DataError(f"{config.name} has no labelled train split; it has {', '.join(parts)}")
    stored = content_key(*(_digest(part, config.image_column) for name, part in parts.items() if name not in others))
    return Splits(**splits, problems=problems, elsewhere=stored)


@dataclass(frozen=True)
class _Items:
    """Pictures of a data set whose items are (picture, target) pairs."""

    dataset: Any

    def __getitem__(self, index: int) -> Image.Image:
        return upright_rgb(self.dataset[index][0])


def _find(name: str, root: Path, arguments: dict[str, Any], download: bool) -> Any:
    if "download" not in inspect.signature(getattr(torchvision.datasets, name)).parameters:
        return _open(name, root, arguments)
    try:
        return _open(name, root, arguments | {"download": False})
    except DataError:
        if not download:
            raise
    root.mkdir(parents=True, exist_ok=True)
    return _open(name, root, arguments | {"download": True})


def _open(name: str, root: Path, arguments: dict[str, Any]) -> Any:
    try:
        return getattr(torchvision.datasets, name)(str(root), **arguments)
    except ModuleNotFoundError as error:
        raise DataError(f"{name} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:  # missing, damaged and half-downloaded files raise as many classes as there are formats
        because = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} is not complete in {root} and can't be downloaded ({because}); put its files there as "
            f"torchvision.datasets.{name} expects them, or run once with data.download=true where there is a network"
        ) from error


def _labelled(dataset: Any, title: str) -> ImageSplit:
    labels = _labels(dataset)
    split = ImageSplit(_class_names(dataset, labels), labels, _names(dataset, title), _Items(dataset))
    return split.choose(sorted(range(len(split)), key=split.names.__getitem__))  # SUN397 lists files as the disk does


def _class_names(dataset: Any, labels: Sequence[int]) -> tuple[str, ...]:
    listed = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or range(max(labels) + 1)
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in listed]  # tuples of synonyms
    # ImageNet has two kinds of crane
    return tuple(f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names))


def _labels(dataset: Any) -> list[int]:
    # torchvision has no common attribute; these are what its classification sets keep their labels in
    for attribute in ("targets", "labels", "_labels", "y"):
        if (values := getattr(dataset, attribute, None)) is not None:
            return [int(value) for value in values]
    for attribute in ("samples", "_samples"):
        if (values := getattr(dataset, attribute, None)) is not None:
            return [int(label) for _, label in values]
    raise TypeError(f"torchvision.datasets.{type(dataset).__name__} keeps its labels in an unknown place")


def _names(dataset: Any, title: str) -> list[str]:
    for attribute in ("_image_files", "_images"):
        if files := getattr(dataset, attribute, None):
            return [str(file) for file in files]
    for attribute in ("samples", "_samples"):
        if (pairs := getattr(dataset, attribute, None)) and isinstance(pairs[0][0], (str, Path)):
            return [str(file) for file, _ in pairs]
    return [f"{title}/{index:06d}" for index in range(len(dataset))]


def _fetch(archive: Path, download: bool) -> None:
    if check_integrity(archive, CUB_MD5):
        return
    if not download:
        raise DataError(f"{archive} is missing or damaged (expected MD5 {CUB_MD5}), and data.download=false")
    try:
        download_url(CUB_URL, archive.parent, archive.name, CUB_MD5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CUB-200-2011 can't be downloaded ({error}); put {archive.name} from {CUB_URL} into {archive.parent}"
        ) from error


def _unpack(archive: Path, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")  # moved when whole, so that what was interrupted starts anew
    shutil.rmtree(part, ignore_errors=True)
    try:
        extract_archive(archive, part)
        (part / folder.name).rename(folder)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{archive} can't be unpacked: {error}") from error
    shutil.rmtree(part)


def _column(table: Path) -> dict[str, str]:
    """The rest of each line by its first word, an identifier."""
    if not table.is_file():
        raise DataError(f"{table} is missing; delete {table.parent} to unpack it again")
    lines = table.read_text(encoding="utf-8").splitlines()
    try:
        return dict(line.split(maxsplit=1) for line in lines if line.strip())
    except ValueError:
        raise DataError(f"{table} has a line of one word; delete {table.parent} to unpack it again") from None


@dataclass(frozen=True)
class _Rows:
    """The pictures in a column."""

    part: Any
    column: str

    def __getitem__(self, index: int) -> Image.Image:
        picture = self.part[index][self.column]
        if picture is None:
            raise ValueError("the row holds no picture")
        return upright_rgb(picture)


def _digest(part: Any, column: str) -> str:
    """A hash of the pictures as they are stored: of all, or of one or two thousand from a set that has more."""
    import datasets

    if not isinstance(part.features.get(column), datasets.Image):
        return ""  # what else it is will be told when it is to be decoded
    stored = part.cast_column(column, datasets.Image(decode=False))
    cells = (stored[row][column] for row in range(0, len(part), max(1, len(part) // 1000)))
    return content_key(*(None if cell is None else cell["bytes"] or _file_digest(cell["path"]) for cell in cells))


def _file_digest(path: str | None) -> str | None:
    """None where it can't be read, which is told when it is to be decoded."""
    try:
        return None if path is None else sha256(Path(path))
    except OSError:
        return None


def _hub_split(part: Any, title: str, config: HfData) -> tuple[ImageSplit, list[str]]:
    """The labelled rows, and the names of the others: the hub has -1 or nothing for a label that is withheld."""
    for key, column in {"image_column": config.image_column, "label_column": config.label_column}.items():
        if column not in part.column_names:
            there = ", ".join(part.column_names)
            raise DataError(f"{config.name} has no column {column!r}; choose data.{key} among {there}")
    feature = part.features[config.label_column]
    if not hasattr(feature, "names"):
        raise DataError(f"{config.name}: column {config.label_column!r} holds {feature}, not class labels")
    names = [f"{title}/{index:06d}" for index in range(len(part))]
    labels = [-1 if label is None else label for label in part[config.label_column]]
    split = ImageSplit(tuple(feature.names), labels, names, _Rows(part, config.image_column))
    labelled = [i for i, label in enumerate(labels) if label >= 0]
    if len(labelled) < len(labels):
        split = split.choose(labelled)
    return split, [name for name, label in zip(names, labels, strict=True) if label < 0]
