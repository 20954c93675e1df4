"""Public data sets: any classification set of torchvision, CUB-200-2011, and the Hugging Face hub's."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torchvision.datasets
from PIL import Image
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from vislora.config import Cub200Data, HfData, TorchvisionData
from vislora.data.folder import checked_splits
from vislora.data.splits import ImageSplit, Splits
from vislora.errors import DataError
from vislora.paths import cache_dir

# How the classification sets of torchvision name their splits: the argument, then its values for train, val and test.
# EMNIST and the detection, segmentation and video sets are left out: they need arguments or give targets of their own.
_BOOLEAN = ("train", {"train": True, "test": False})
_TRAIN_TEST = ("split", {"train": "train", "test": "test"})
_THREE = ("split", {"train": "train", "val": "val", "test": "test"})
_TORCHVISION: dict[str, tuple[str | None, dict[str, Any]]] = {
    "CIFAR10": _BOOLEAN,
    "CIFAR100": _BOOLEAN,
    "MNIST": _BOOLEAN,
    "FashionMNIST": _BOOLEAN,
    "KMNIST": _BOOLEAN,
    "USPS": _BOOLEAN,
    "Food101": _TRAIN_TEST,
    "GTSRB": _TRAIN_TEST,
    "STL10": _TRAIN_TEST,
    "StanfordCars": _TRAIN_TEST,
    "SVHN": _TRAIN_TEST,
    "DTD": _THREE,
    "FGVCAircraft": _THREE,
    "Flowers102": _THREE,
    "PCAM": _THREE,
    "RenderedSST2": _THREE,
    "Imagenette": ("split", {"train": "train", "val": "val"}),
    "OxfordIIITPet": ("split", {"train": "trainval", "test": "test"}),
    "Country211": ("split", {"train": "train", "val": "valid", "test": "test"}),
    "FER2013": _TRAIN_TEST,
    "Caltech101": (None, {"train": None}),
    "Caltech256": (None, {"train": None}),
    "EuroSAT": (None, {"train": None}),
    "SUN397": (None, {"train": None}),
    "SEMEION": (None, {"train": None}),
}

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


@dataclass(frozen=True)
class _Items:
    """Pictures of a data set that gives (picture, target) pairs."""

    dataset: Any

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[index][0].convert("RGB")


def torchvision_set(config: TorchvisionData) -> Splits:
    """A classification set of torchvision.datasets with its own splits.

    Raises:
        DataError: an unknown set, or files that are neither there nor can be downloaded.
    """
    if config.name not in _TORCHVISION:
        raise DataError(
            f"data.name={config.name} is no classification set of torchvision; there are {', '.join(_TORCHVISION)}"
        )
    argument, values = _TORCHVISION[config.name]
    factory = getattr(torchvision.datasets, config.name)
    root = Path(config.root) if config.root else cache_dir() / "torchvision" / config.name
    download = {"download": True} if config.download and "download" in inspect.signature(factory).parameters else {}
    root.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, value in values.items():
        chosen = {} if argument is None else {argument: value}
        try:
            dataset = factory(str(root), **chosen, **download)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{config.name} is not complete in {root} and can't be downloaded ({str(error).splitlines()[0]}); "
                "put its files there as torchvision expects them, or run once where there is a network"
            ) from error
        splits[name] = _labelled(dataset, config.name)
    return Splits(**splits)


def cub200(config: Cub200Data) -> Splits:
    """CUB-200-2011 (Wah et al. 2011): 200 bird species, 5,994 pictures to train on and 5,794 to test on.

    Raises:
        DataError: the files are not there and can't be downloaded, or the archive is damaged.
    """
    root = Path(config.root) if config.root else cache_dir() / "cub200"
    folder, archive = root / "CUB_200_2011", root / "CUB_200_2011.tgz"
    if not (folder / "images.txt").is_file():
        _fetch_cub(archive, config.download)
        extract_archive(str(archive), str(root))
    names = _columns(folder / "classes.txt")
    classes = tuple(name.partition(".")[2].replace("_", " ") for name in names.values())
    label_of = dict(zip(names, classes, strict=True))
    images, labels = _columns(folder / "images.txt"), _columns(folder / "image_class_labels.txt")
    training = _columns(folder / "train_test_split.txt")
    files: dict[str, list[tuple[Path, str]]] = {"train": [], "test": []}
    for key, name in images.items():
        split = "train" if training[key] == "1" else "test"
        files[split].append((folder / "images" / name, label_of[labels[key]]))
    return checked_splits(files, classes)


def hub_set(config: HfData) -> Splits:
    """An image classification set of the Hugging Face hub, with the splits it has.

    Raises:
        DataError: the `datasets` package is missing, the set is out of reach, or lacks a column.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("data=hf needs the datasets package: pip install 'vislora[hf]'") from None
    try:
        parts = load_dataset(config.name, config.subset)
    except Exception as error:  # the package documents no common class
        raise DataError(f"data.name={config.name} can't be loaded: {str(error).splitlines()[0]}") from error
    splits = {}
    for name, spellings in {"train": ["train"], "val": ["validation", "val", "valid"], "test": ["test"]}.items():
        if part := next((parts[s] for s in spellings if s in parts), None):
            for column in (config.image_column, config.label_column):
                if column not in part.column_names:
                    raise DataError(f"{config.name} has no column {column!r}; it has {', '.join(part.column_names)}")
            label = part.features[config.label_column]
            if not hasattr(label, "names"):
                raise DataError(f"{config.name}: column {config.label_column!r} holds no class labels")
            pairs = _Rows(part, config.image_column)
            names = [f"{name}/{i}" for i in range(len(part))]
            splits[name] = ImageSplit(tuple(label.names), list(part[config.label_column]), names, pairs)
    if "train" not in splits:
        raise DataError(f"{config.name} has no train split; it has {', '.join(parts)}")
    return Splits(**splits)


@dataclass(frozen=True)
class _Rows:
    part: Any
    column: str

    def __getitem__(self, index: int) -> Image.Image:
        return self.part[index][self.column].convert("RGB")


def _labelled(dataset: Any, title: str) -> ImageSplit:
    labels = _labels(dataset)
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not names:
        names = [str(k) for k in range(max(labels) + 1)]
    # Imagenette lists several words per class
    classes = tuple(name if isinstance(name, str) else name[0] for name in names)
    return ImageSplit(classes, labels, [f"{title}/{i}" for i in range(len(labels))], _Items(dataset))


def _labels(dataset: Any) -> list[int]:
    # torchvision has no common attribute; these are what its classification sets keep their labels in
    for attribute in ("targets", "labels", "_labels", "y"):
        values: Sequence[Any] | None = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    for attribute in ("samples", "_samples", "_image_files"):
        values = getattr(dataset, attribute, None)
        if values and isinstance(values[0], tuple):
            return [int(label) for _, label in values]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _fetch_cub(archive: Path, download: bool) -> None:
    if check_integrity(str(archive), CUB_MD5):
        return
    if not download:
        raise DataError(f"{archive} is missing or damaged (MD5 {CUB_MD5} expected), and data.download=false")
    try:
        download_url(CUB_URL, str(archive.parent), archive.name, CUB_MD5)
    except (URLError, OSError, RuntimeError) as error:
        raise DataError(
            f"CUB-200-2011 can't be downloaded ({str(error).splitlines()[0]}); put {archive.name} from {CUB_URL} into "
            f"{archive.parent}"
        ) from error


def _columns(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise DataError(f"{path} is missing: the archive is incomplete; delete {path.parent} to unpack it again")
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if line.strip())
