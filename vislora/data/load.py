"""A data set by its settings. To add one: a class in `vislora.config.DATA_OPTIONS`, a function, and a row here."""

from collections.abc import Callable
from dataclasses import replace

from vislora.config import BirdsData, CsvData, Cub200Data, DataConfig, HfData, ImageFolderData, TorchvisionData
from vislora.data.drawn import drawn_birds
from vislora.data.folder import image_folder
from vislora.data.public import cub200, hub_set, torchvision_set
from vislora.data.splits import Splits, hold_out
from vislora.data.table import image_table

_LOADERS: dict[type[DataConfig], Callable[..., Splits]] = {
    BirdsData: drawn_birds,
    ImageFolderData: image_folder,
    CsvData: image_table,
    TorchvisionData: torchvision_set,
    Cub200Data: cub200,
    HfData: hub_set,
}


def load_splits(config: DataConfig, seed: int) -> Splits:
    """The splits of a data set; where it has none to validate on, `config.val_fraction` of train is held out.

    Raises:
        DataError: what is wrong with the data, and where.
    """
    splits = _LOADERS[type(config)](config)
    if splits.val is None and config.val_fraction > 0:
        train, val = hold_out(splits.train, config.val_fraction, seed)
        splits = replace(splits, train=train, val=val)
    return splits
