"""What is learned from: `data=OPTION`.

Options differ in their keys and have a class each. A data set of your own is a class here and a row of
`DATA_OPTIONS`.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vislora.config.ranges import check_ranges, check_shares
from vislora.config.values import literal, to_dict
from vislora.errors import ConfigError, first_line


@dataclass
class AugmentConfig:
    """What training does to an image, by torchvision's transforms; validation only resizes and crops the centre."""

    crop_scale: float = 1.0  # smallest share of the area that RandomResizedCrop keeps; 1 resizes as validation does
    hflip: float = 0.5  # probability
    color_jitter: float = 0.0  # strength on brightness, contrast and saturation; hue gets a quarter
    rotate: float = 0.0  # degrees to either side
    erase: float = 0.0  # probability of RandomErasing
    patch_drop: float = 0.0  # share of the patches that a ViT isn't shown (PatchDropout)

    def __post_init__(self) -> None:
        check_shares(self, "data.augment.", "patch_drop")
        check_ranges(self, "data.augment.", crop_scale=(0.01, 1), rotate=(0, 180))
        check_ranges(self, "data.augment.", **dict.fromkeys(("hflip", "color_jitter", "erase"), (0, 1)))


_DRAWN_SIZES = (32, 512)  # pixels of a side


@dataclass
class BaseData:
    """What is learned from."""

    def __post_init__(self) -> None:
        if getattr(self, "root", None) == "":  # as of an unset shell variable: it would be the current folder
            raise ConfigError("data.root is empty; give the folder of the data set")


@dataclass
class PriorConfig:
    """Prior preservation (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242): pictures of the subject's class in
    general, learned beside it so that the class isn't forgotten. Drawn by the untuned pipeline where there are none."""

    prompt: str | None = None  # as "a photo of a dog"; null: none are learned
    images: str | None = None  # a folder of them
    count: int = 100  # to draw, where no folder is given
    weight: float = 1.0  # of their loss

    def __post_init__(self) -> None:
        check_ranges(self, "data.prior.", count=(1, math.inf), weight=(0, math.inf))
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.prompt is None and given:
            raise ConfigError(f"data.prior.{given[0]} needs data.prior.prompt, the caption of those pictures")
        if self.images is not None and "count" in given:
            raise ConfigError(
                f"data.prior.count={self.count} is how many to draw, and data.prior.images gives a folder of them; "
                "leave one of the two out"
            )


@dataclass
class CaptionedData(BaseData):
    """What all data sets of captioned pictures share."""

    size: int | None = None  # pixels of a square's side; what the pipeline was made for by default
    buckets: bool = False  # keep aspect ratios: as many pixels as the square, in sides that fit
    hflip: float = 0.0  # probability; not for captions that tell left from right
    repeats: int = 1  # showings of each picture an epoch; with a prior more, until they are as many as its pictures
    cache: bool = True  # encode pictures and captions once and keep them on disk
    prior: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.", size=(1, math.inf), hflip=(0, 1), repeats=(1, math.inf))


@dataclass
class CaptionsData(CaptionedData):
    """A folder of pictures, their captions in metadata.jsonl (or .csv) or in .txt (or .caption) files beside them; or
    one prompt for all."""

    root: str = MISSING
    prompt: str | None = None  # in place of captions, as "a photo of sks dog"
    val_fraction: float = 0.0  # share held out
    quarantine: str | None = None  # a list of files to leave out, as `python -m vislora.preflight` writes it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "data.", "val_fraction")


@dataclass
class BirdsCaptionsData(CaptionedData):
    """Drawn birds with captions, in any style."""

    species: list[str] | None = None  # names, drawn in turn; all named ones by default
    count: int = 40
    val_count: int = 27
    prefix: str = ""  # before each caption, as "ink sketch of "
    style: str = "ink"
    difficulty: float = 0.1
    drawn_size: int = 64  # pixels of the drawings
    seed: int = 1  # of the drawings

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.", count=(1, math.inf), val_count=(0, math.inf))
        check_ranges(self, "data.", difficulty=(0, 1), drawn_size=_DRAWN_SIZES)


@dataclass
class DataConfig(BaseData):
    """What all labelled data sets share."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    val_fraction: float = 0.0  # share of train held out per class, where the data has no validation split of its own
    crop_pct: float | None = None  # share of the resized image that the centre crop keeps; the model's by default

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "data.", crop_pct=(0.01, 1))
        check_shares(self, "data.", "val_fraction")


@dataclass
class BirdsData(DataConfig):
    """Drawn birds: the named species, or `invented` ones for pretraining."""

    species: list[str] | None = None  # names; all named ones by default
    invented: int = 0  # draw this many invented species instead
    train_per_species: int = 20
    val_per_species: int = 10
    test_per_species: int = 40
    difficulty: float = 0.35  # 0: field-guide plates, 1: field conditions
    style: str = "natural"
    size: int = 64  # pixels of the drawings
    seed: int = 0  # of the drawings, apart from training's own

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("invented", "val_per_species", "test_per_species")
        check_ranges(self, "data.", train_per_species=(1, math.inf), **dict.fromkeys(counts, (0, math.inf)))
        check_ranges(self, "data.", difficulty=(0, 1), size=_DRAWN_SIZES)
        if self.invented and self.species is not None:
            raise ConfigError("data.species names birds, and data.invented draws others instead; leave one of them out")


@dataclass
class ImageFolderData(DataConfig):
    """Class folders: root/{train,val,test}/CLASS/*, or root/CLASS/* with a val_fraction."""

    root: str = MISSING
    quarantine: str | None = None  # a list of files to leave out, as `python -m vislora.preflight` writes it


@dataclass
class CsvData(DataConfig):
    """A table with a column of image paths (relative to root), one of labels, and optionally one of splits."""

    root: str = MISSING
    table: str = "labels.csv"  # relative to root
    image_column: str = "image"
    label_column: str = "label"
    split_column: str | None = None  # holds train, val or test; by default that called split, where there is one
    quarantine: str | None = None  # as above


@dataclass
class MetadataData(DataConfig):
    """Hugging Face's image folders: root/{train,val,test}/metadata.jsonl, or root/metadata.jsonl with a val_fraction; a
    line is {"file_name": …, "label": …}. metadata.csv will do as well, with such columns."""

    root: str = MISSING
    label_key: str = "label"
    quarantine: str | None = None  # as above


@dataclass
class ShardsData(DataConfig):
    """Tar files as webdataset packs them: NAME.jpg beside NAME.cls or NAME.json. A split is a pattern of files in root:
    'train-*.tar', or 'train-{000..012}.tar'."""

    root: str = MISSING
    train: str = "train*.tar"
    val: str | None = None
    test: str | None = None
    label_key: str = "label"  # of NAME.json
    quarantine: str | None = None  # as above
    classes: list[str] | None = None  # names of labels that are numbers, from 0


@dataclass
class TorchvisionData(DataConfig):
    """Any classification set of torchvision.datasets by its class name."""

    name: str = MISSING
    root: str | None = None  # where it is or goes; the cache by default
    download: bool = True
    val_fraction: float = 0.1


@dataclass
class Cub200Data(DataConfig):
    """CUB-200-2011 with its own split, downloaded and checked."""

    root: str | None = None
    download: bool = True
    quarantine: str | None = None  # as above


@dataclass
class HfData(DataConfig):
    """An image classification set of the Hugging Face hub (needs the `hf` extra)."""

    name: str = MISSING
    subset: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    val_fraction: float = 0.1


DATA_OPTIONS: dict[str, type[BaseData]] = {
    "birds": BirdsData,
    "imagefolder": ImageFolderData,
    "csv": CsvData,
    "metadata": MetadataData,
    "shards": ShardsData,
    "torchvision": TorchvisionData,
    "cub200": Cub200Data,
    "hf": HfData,
    "captions": CaptionsData,
    "birds_captions": BirdsCaptionsData,
}


def data_to_dict(config: BaseData) -> dict[str, Any]:
    """A data set's settings as JSON values, with the name of its option."""
    option = next(name for name, schema in DATA_OPTIONS.items() if type(config) is schema)
    return {"option": option} | to_dict(config)


def pictures_to_dict(config: BaseData) -> dict[str, Any]:
    """Those of them that decide which pictures a data set has, and not what training does to them."""
    return {key: value for key, value in data_to_dict(config).items() if key not in ("augment", "crop_pct")}


def data_from_dict(values: Any) -> BaseData:
    """The inverse of `data_to_dict`, of what a file says.

    Raises:
        ConfigError: these aren't settings of a data set.
    """
    option = values.get("option") if isinstance(values, dict) else None
    if option not in list(DATA_OPTIONS):
        raise ConfigError(
            f"data: {option!r} is no data set of this version of vislora; it has {', '.join(DATA_OPTIONS)}"
        )
    try:
        own = {key: literal(value) for key, value in values.items() if key != "option"}
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DATA_OPTIONS[option]), own))
    except OmegaConfBaseException as error:
        raise ConfigError(f"data={option}: {first_line(error)}") from None
