"""A data set by its settings. To add one: a class in `vislora.config.data.DATA_OPTIONS`, a file in conf/data, a
function, and a row here."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from vislora.config.data import (
    BaseData,
    BirdsCaptionsData,
    BirdsData,
    CaptionedData,
    CaptionsData,
    CsvData,
    Cub200Data,
    DataConfig,
    HfData,
    ImageFolderData,
    MetadataData,
    ShardsData,
    TorchvisionData,
)
from vislora.data.captions import CaptionedSplits, captions_folder, list_captions
from vislora.data.drawn import drawn_birds, drawn_captions
from vislora.data.folder import image_folder, list_folder
from vislora.data.metadata import list_metadata, metadata_folder
from vislora.data.public import cub200, hub_set, torchvision_set
from vislora.data.quarantine import Labelled
from vislora.data.shards import image_shards
from vislora.data.splits import Splits, hold_out
from vislora.data.table import image_table, list_table
from vislora.errors import DataError
from vislora.paths import user_path

_LOADERS: dict[type[DataConfig], Callable[..., Splits]] = {
    BirdsData: drawn_birds,
    ImageFolderData: image_folder,
    CsvData: image_table,
    MetadataData: metadata_folder,
    ShardsData: image_shards,
    TorchvisionData: torchvision_set,
    Cub200Data: cub200,
    HfData: hub_set,
}

_CAPTIONED: dict[type[CaptionedData], Callable[..., CaptionedSplits]] = {
    CaptionsData: captions_folder,
    BirdsCaptionsData: drawn_captions,
}

_LISTS: dict[type[BaseData], Callable[..., Labelled]] = {
    ImageFolderData: list_folder,
    CsvData: list_table,
    MetadataData: list_metadata,
    CaptionsData: list_captions,
}


def load_captions(config: CaptionedData) -> CaptionedSplits:
    """Captioned pictures to learn from and to validate on.

    Raises:
        DataError: what is wrong with the data, and where.
    """
    _check_root(config)
    return _CAPTIONED[type(config)](config)


def load_splits(config: DataConfig, seed: int, fewest: int = 2) -> Splits:
    """The splits of a data set; where it has none to validate on, `config.val_fraction` of train is held out.

    Args:
        fewest: how many classes it has at least; pictures of a single one can be scored, but not told apart.

    Raises:
        DataError: what is wrong with the data, and where.
    """
    _check_root(config)
    splits = _LOADERS[type(config)](config)
    if len(splits.classes) < fewest:
        one = f"one class alone, {splits.classes[0]!r}" if splits.classes else "no class"
        raise DataError(f"the data has {one}, and at least two are needed to be told apart")
    if twice := [name for name, count in Counter(splits.classes).items() if count > 1]:
        raise DataError(f"two classes of the data are called {twice[0]!r}")
    if odd := [name for name in splits.classes if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise DataError(f"class {odd[0]!r} of the data is no text in UTF-8, as files and figures need it; rename it")
    for name, split in {"val": splits.val, "test": splits.test}.items():
        if split is not None and split.classes != splits.classes:
            other, expected = next(pair for pair in zip_longest(split.classes, splits.classes) if pair[0] != pair[1])
            raise DataError(f"{name} and train have different classes: {other!r} where train has {expected!r}")
    if splits.val is None and config.val_fraction > 0:
        train, val = hold_out(splits.train, config.val_fraction, seed)
        splits = replace(splits, train=train, val=val, held_out=True)
    return splits


def list_files(config: BaseData) -> Labelled | None:
    """The files of a data set as they are, with labels or captions, also where loading refuses them.

    Returns:
        (file, label or caption) pairs by split; None for a data set that isn't in files.

    Raises:
        DataError: they can't even be listed.
    """
    _check_root(config)
    return _LISTS[type(config)](config) if type(config) in _LISTS else None


def _check_root(config: BaseData) -> None:
    root = getattr(config, "root", None)
    if root is not None and user_path(root).is_file():
        table = f", and data.table={Path(root).name}" if isinstance(config, CsvData) else ""
        raise DataError(f"data.root={root} is a file; give the folder that it is in{table}")
