"""Every setting of every command, typed; conf/ gives the values, recipes/ combine them.

A group whose options differ in their keys has a class for each, so that a key which an option doesn't know is refused
before anything heavy is imported.
"""

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vislora.errors import ConfigError


def _check_ranges(config: Any, group: str = "", **ranges: tuple[float, float]) -> None:
    """Refuse numbers out of range, both ends of which are allowed; None stands for no number."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ConfigError(f"{group}{name}={value}: expected {expected}")


def _check_shares(config: Any, group: str, *names: str) -> None:
    """Refuse what isn't a share that leaves something; None stands for no number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{group}{name}={value}: expected 0 to below 1")


class Precision(Enum):
    """What the matrix products of a step are computed in; trained parameters are float32 in all of them."""

    auto = "auto"  # bf16 or fp16 as the GPU has it; on a CPU bf16 only where it is native
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Keep(Enum):
    """Which of a run's parameters are exported."""

    best = "best"  # by the validation figure; the last ones where nothing is validated
    last = "last"


class PrefixCache(Enum):
    """Where the features of the frozen blocks before the first trained one are kept, so that they are computed once."""

    off = "off"  # nowhere: they are computed in every step
    memory = "memory"
    disk = "disk"  # in the cache folder, for later runs too


class Target(Enum):
    """A projection of an attention block that an adapter can act on."""

    qkv = "qkv"  # q, k and v together; where they are one fused layer: one pair of matrices for it, as PEFT has it
    q = "q"
    k = "k"
    v = "v"
    o = "o"
    mlp = "mlp"
    conv = "conv"  # the other convolutions that aren't grouped


class Bias(Enum):
    """Which of the model's biases are trained with the low-rank pairs."""

    none = "none"
    lora_only = "lora_only"  # those of the adapted layers
    all = "all"


class PipelineTarget(Enum):
    """A projection in a diffusion pipeline's UNet or transformer, and in its text encoders (up to mlp)."""

    qkv = "qkv"  # q, k and v; where they are fused: one pair of matrices for them
    q = "q"
    k = "k"
    v = "v"
    o = "o"
    mlp = "mlp"
    proj = "proj"  # proj_in and proj_out around a UNet's transformer blocks
    conv = "conv"  # a UNet's residual and resampling convolutions


class Attends(Enum):
    """What an attention block of a UNet looks at."""

    self = "self"  # the image
    cross = "cross"  # the text


@dataclass
class BaseModel:
    """What is tuned."""


@dataclass
class PipelineConfig(BaseModel):
    """A text-to-image pipeline of diffusers. `name` is a folder in diffusers' layout, a name on the hub, or `embedded`,
    the one that ships."""

    name: str = MISSING
    revision: str | None = None  # of a hub model: a branch, tag or commit
    variant: str | None = None  # of a hub model's files, as fp16
    gradient_checkpointing: bool = False  # a third more time, far less memory


@dataclass
class ModelConfig(BaseModel):
    """A timm model. `name` is timm's own, `local-dir:FOLDER` in timm's layout, or `embedded`, the one that ships."""

    name: str = MISSING
    weights: str = "pretrained"  # pretrained: the hub's or the folder's; random; or a .safetensors file
    img_size: int | None = None  # pixels; the weights' own by default, pos_embed is resampled to another
    pool: str | None = None  # timm's global_pool: avg, token, …; the model's own by default
    drop_path: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model

    def __post_init__(self) -> None:
        _check_ranges(self, "model.", img_size=(1, math.inf), drop_path=(0, 1))


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
        _check_shares(self, "data.augment.", "patch_drop")
        _check_ranges(self, "data.augment.", crop_scale=(0.01, 1), rotate=(0, 180))
        _check_ranges(self, "data.augment.", **dict.fromkeys(("hflip", "color_jitter", "erase"), (0, 1)))


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
    count: int = 100
    weight: float = 1.0  # of their loss

    def __post_init__(self) -> None:
        _check_ranges(self, "data.prior.", count=(1, math.inf), weight=(0, math.inf))
        if self.images is not None and self.prompt is None:
            raise ConfigError("data.prior.images needs data.prior.prompt, the caption of those pictures")


@dataclass
class CaptionedData(BaseData):
    """What all data sets of captioned pictures share."""

    size: int | None = None  # pixels of a square's side; what the pipeline was made for by default
    buckets: bool = False  # keep aspect ratios: as many pixels as the square, in sides that fit
    hflip: float = 0.0  # probability; not for captions that tell left from right
    repeats: int = 1  # showings of each picture an epoch
    cache: bool = True  # encode pictures and captions once and keep them on disk
    prior: PriorConfig = field(default_factory=PriorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ranges(self, "data.", size=(1, math.inf), hflip=(0, 1), repeats=(1, math.inf))


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
        _check_shares(self, "data.", "val_fraction")


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
        _check_ranges(self, "data.", count=(1, math.inf), val_count=(0, math.inf))
        _check_ranges(self, "data.", difficulty=(0, 1), drawn_size=_DRAWN_SIZES)


@dataclass
class DataConfig(BaseData):
    """What all labelled data sets share."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    val_fraction: float = 0.0  # share of train held out per class, where the data has no validation split of its own
    crop_pct: float | None = None  # share of the resized image that the centre crop keeps; the model's by default

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ranges(self, "data.", crop_pct=(0.01, 1))
        _check_shares(self, "data.", "val_fraction")


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
        _check_ranges(self, "data.", train_per_species=(1, math.inf), **dict.fromkeys(counts, (0, math.inf)))
        _check_ranges(self, "data.", difficulty=(0, 1), size=_DRAWN_SIZES)


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
    split_column: str | None = None  # holds train, val or test
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


@dataclass
class AdapterConfig:
    """How the base model is tuned."""


@dataclass
class LoraAdapter(AdapterConfig):
    """Low-rank adapters on attention projections; the head is trained in full."""

    targets: list[Target] = field(default_factory=lambda: [Target.qkv, Target.o])
    # which of the attention blocks; all by default. Indices (negative from the end), 2-5, last:4, first:4, a regular
    # expression for a block's name (in a pipeline, a module's name: up_blocks.1), or a list of these
    blocks: Any = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # train the length of each output row apart from its direction
    pissa: bool = False  # start from the weights' principal part; exported as a plain LoRA of twice the rank
    bias: Bias = Bias.none
    trained: list[str] = field(default_factory=list)  # besides the head in full: norms, or patterns of modules' names
    rank_pattern: dict[str, int] = field(default_factory=dict)  # pattern of a layer's name: its rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    start: str | None = None  # an adapter to go on from; its own layers, ranks, scales and kind count then

    def __post_init__(self) -> None:
        _check_ranges(self, "adapter.", rank=(1, math.inf), alpha=(0, math.inf), dropout=(0, 0.99))
        blocks = [*self.blocks] if isinstance(self.blocks, list | tuple) else [self.blocks]
        if self.blocks is not None and not all(type(block) in (int, str) for block in blocks):
            raise ConfigError(f"adapter.blocks={self.blocks}: expected numbers, ranges or names of blocks, or a list")
        if self.start == "":
            raise ConfigError("adapter.start is empty; give an adapter's file or folder, or null to start anew")
        if self.pissa and self.dora:
            raise ConfigError("adapter.pissa and adapter.dora exclude each other; choose one")
        if self.pissa and self.dropout:
            raise ConfigError(
                f"adapter.dropout={self.dropout} would drop principal parts of the weights; adapter.pissa needs 0"
            )
        for key in ("rank_pattern", "alpha_pattern", "trained"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"adapter.{key}: {pattern!r} isn't a regular expression: {error}") from None


@dataclass
class PipelineLora(LoraAdapter):
    """Low-rank adapters in a pipeline's UNet or transformer, and if wanted in its text encoders."""

    targets: list[PipelineTarget] = field(default_factory=lambda: [PipelineTarget.qkv, PipelineTarget.o])
    attention: list[Attends] = field(default_factory=lambda: [Attends.self, Attends.cross])
    text_encoder: bool = False  # adapt q, k, v and o of the text encoders too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias is not Bias.none or self.trained:
            raise ConfigError(
                "adapter.bias and adapter.trained aren't for pipelines: their files hold low-rank pairs alone"
            )


@dataclass
class ProbeAdapter(AdapterConfig):
    """A linear probe: the head alone is trained."""


@dataclass
class FullAdapter(AdapterConfig):
    """Full fine-tuning: everything is trained."""


@dataclass
class ObjectiveConfig:
    """What is optimised."""


@dataclass
class RecognitionObjective(ObjectiveConfig):
    """Cross-entropy on class labels."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_ranges(self, "objective.", label_smoothing=(0, 1))


@dataclass
class DiffusionObjective(ObjectiveConfig):
    """The error of what the pipeline's scheduler wants predicted: noise, velocity or flow."""

    min_snr_gamma: float | None = None  # cap of the signal-to-noise ratio in the loss weight; usually 5
    noise_offset: float = 0.0  # strength of noise that a whole channel shares; 0.05 for very dark or bright styles
    timestep_shift: float = 1.0  # above 1: trained at more noise; below 1: at less
    caption_dropout: float = 0.0  # share of showings without a caption
    prompts: list[str] | None = None  # of the preview pictures; captions of the data by default
    preview_steps: int = 25  # of sampling
    guidance: float = 5.0  # of the preview pictures
    before_after: int = 4  # prompts of the report's pictures without and with the adapter; 0 for none

    def __post_init__(self) -> None:
        _check_ranges(
            self, "objective.", caption_dropout=(0, 1), preview_steps=(1, math.inf), before_after=(0, math.inf)
        )
        _check_ranges(self, "objective.", noise_offset=(0, math.inf), timestep_shift=(0.01, 100))
        if self.prompts is not None and not self.prompts:
            raise ConfigError("objective.prompts is empty; give at least one, or null for captions of the data")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0.0:
            raise ConfigError(f"objective.min_snr_gamma={self.min_snr_gamma}: expected more than 0, or null")


@dataclass
class OptimConfig:
    """AdamW with warm-up and cosine decay to zero."""

    lr: float = 2e-3  # of adapters (of the whole model in full fine-tuning)
    b_lr_ratio: float = 1.0  # LoRA+: the rate of lora_B over that of lora_A
    head_lr: float | None = None  # of the head; lr by default
    weight_decay: float = 0.01  # on matrices; never on biases, norms, embeddings and scales
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1  # share of all steps
    clip_norm: float | None = 1.0  # of the gradient; null: no clipping

    def __post_init__(self) -> None:
        _check_ranges(self, "optim.", **dict.fromkeys(("lr", "b_lr_ratio", "head_lr", "clip_norm"), (0, math.inf)))
        _check_ranges(self, "optim.", weight_decay=(0, math.inf), warmup=(0, 1))
        if self.clip_norm == 0.0:
            raise ConfigError("optim.clip_norm=0 would leave nothing of the gradient; without clipping it is null")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas={[*self.betas]}: expected two numbers from 0 to below 1")


@dataclass
class TrainerConfig:
    epochs: int = 10
    batch_size: int = 32  # images per optimizer step, over all processes and accumulated passes
    accumulation: int = 1  # forward passes an optimizer step is divided into
    precision: Precision = Precision.auto
    workers: int = 0  # loader processes; results don't depend on it
    validate_every: int = 1  # epochs
    patience: int | None = None  # stop after so many validations without a better metric
    keep: Keep = Keep.best  # which parameters are exported
    ema: float | None = None  # decay of a moving average of what is trained, which is then validated and exported
    preview_every: int | None = None  # steps between pictures of what is learned, where the objective draws any
    prefix_cache: PrefixCache = PrefixCache.off  # with the last blocks adapted, and no random augmentation but hflip
    checkpoint_every: int | None = None  # steps; at the end of each epoch as well
    resume: str | None = None  # a run folder or one of its checkpoints
    progress: bool = True

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulation", "validate_every")
        counts += ("patience", "preview_every", "checkpoint_every")
        _check_ranges(self, "trainer.", **dict.fromkeys(counts, (1, math.inf)), workers=(0, math.inf))
        _check_shares(self, "trainer.", "ema")


class Tracker(Enum):
    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass
class LoggerConfig:
    """Beside metrics.jsonl, which is always written."""

    trackers: list[Tracker] | None = None  # tensorboard where it is installed by default; [] for none
    project: str = "vislora"


@dataclass
class TrainConfig:
    """`python -m vislora.train`"""

    seed: int = 0
    model: BaseModel = MISSING
    data: BaseData = MISSING
    adapter: AdapterConfig = MISSING
    objective: ObjectiveConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING

    def __post_init__(self) -> None:
        _check_ranges(self, seed=(0, 2**63 - 1))


class Baseline(Enum):
    """What an adapter is compared with."""

    zero = "zero"  # the base model with the adapter's head
    probe = "probe"  # the base model with a linear classifier fitted to its features of the training images


class Corruption(Enum):
    """What is done to pictures to see what a classifier bears; each in five strengths."""

    noise = "noise"
    blur = "blur"
    brightness = "brightness"
    contrast = "contrast"
    jpeg = "jpeg"
    pixelate = "pixelate"


def _check_drawing(config: Any) -> None:
    """Refuse what no pipeline can draw."""
    _check_ranges(config, steps=(1, math.inf), size=(1, math.inf))
    if wrong := [seed for seed in config.seeds if not -(2**63) <= seed < 2**64]:
        raise ConfigError(f"seeds: {wrong[0]} is no number of 64 bits")


@dataclass
class RecognitionFigures:
    """What is asked about adapters that recognise."""

    weights: str | None = None  # where the base weights are now, if not where the adapter was trained
    data: DataConfig | None = None  # what each adapter was trained on by default
    sets: dict[str, DataConfig] = field(default_factory=dict)  # further ones by name: +data@sets.NAME=OPTION
    split: str = "test"
    baselines: list[Baseline] = field(default_factory=list)
    calibrate: bool = False  # fit a temperature on the validation split, for another one
    corruptions: list[Corruption] = field(default_factory=list)
    maps: int = 6  # pictures to show what the classifier looked at in; 0 for none
    map_images: list[str] = field(default_factory=list)  # files to show that of instead
    mistakes: int = 24  # the most confident ones to show
    workers: int = 0


@dataclass
class PictureFigures:
    """What is asked about adapters that draw."""

    # a file with a prompt a line (`prompt`, or `prompt | label`; .jsonl: {"prompt": …, "label": …}), or a list of such
    # lines; the captions held out from the adapter's training by default
    prompts: Any = None
    unrelated: Any = None  # such a file or list, of prompts that the adapter should leave alone; a few by default
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    scales: list[float] = field(default_factory=lambda: [1.0])  # of each adapter; several show what to choose
    reference: str | None = None  # a folder of pictures as they should be; those of the training by default
    backbone: ModelConfig = field(default_factory=lambda: ModelConfig(name="embedded"))  # whose features are compared
    style_classifier: str | None = None  # the folder of a recogniser of styles
    style: str | None = None  # its class that is wanted; what it takes most reference pictures for by default
    content_classifier: str | None = None  # the folder of a recogniser of the prompts' labels
    clip: str | None = None  # a CLIP model of transformers: a folder, or a name on the hub
    model: PipelineConfig = field(default_factory=lambda: PipelineConfig(name="auto"))  # what they were trained on
    steps: int = 25
    guidance: float = 5.0
    size: int | None = None  # pixels of a side; what the pipeline was made for by default
    drawn_at_once: int = 8


@dataclass
class EvaluateConfig(PictureFigures, RecognitionFigures):
    """`python -m vislora.evaluate`"""

    adapter: list[str] = MISSING  # adapters, or merged or fully tuned classifiers; one needs no brackets
    resamples: int = 2000  # of the images, for the intervals
    seed: int = 0
    batch_size: int = 64
    precision: Precision = Precision.auto

    def __post_init__(self) -> None:
        _check_ranges(self, resamples=(2, math.inf), seed=(0, 2**63 - 1), batch_size=(1, math.inf))
        _check_ranges(self, **dict.fromkeys(("maps", "mistakes", "workers"), (0, math.inf)))
        _check_drawing(self)
        _check_ranges(self, drawn_at_once=(1, math.inf))
        if self.split not in ("train", "val", "test"):
            raise ConfigError(f"split={self.split}: expected train, val or test")
        if self.calibrate and self.split == "val":
            raise ConfigError(
                "calibrate=true fits a temperature to split=val, and would look better there than it is; give "
                "split=test, or leave calibrate out"
            )
        if self.style is not None and self.style_classifier is None:
            raise ConfigError(f"style={self.style} is a class of the style classifier; give style_classifier=FOLDER")
        for key in ("seeds", "scales"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{key}={values}: expected at least one, each once")


@dataclass
class PredictConfig:
    """`python -m vislora.predict`"""

    adapter: str = MISSING
    weights: str | None = None
    images: list[str] = MISSING
    top: int = 5
    batch_size: int = 64
    precision: Precision = Precision.fp32

    def __post_init__(self) -> None:
        _check_ranges(self, top=(1, math.inf), batch_size=(1, math.inf))


class ExportTo(Enum):
    """What `python -m vislora.export` writes."""

    merged = "merged"  # a timm model with the adapter folded in
    peft = "peft"  # a PEFT folder; of a pipeline's adapter one for each component
    diffusers = "diffusers"  # pytorch_lora_weights.safetensors of a pipeline's adapter
    kohya = "kohya"  # one file for ComfyUI, A1111 and their kin


@dataclass
class ExportConfig:
    """`python -m vislora.export`"""

    adapter: str = MISSING  # of any format
    to: ExportTo = ExportTo.merged
    weights: str | None = None
    pipeline: str | None = None  # diffusers' class, as FluxPipeline, for what other programs wrote for a transformer
    out: str = MISSING


@dataclass
class UsedAdapters:
    """Adapters of a pipeline at work: `adapter=FILE adapter.scale=0.8`, or `adapter=[FILE,FILE]`."""

    files: list[str] = field(default_factory=list)  # of any format; none: the base model
    scale: float = 1.0  # 0: the base model, 1: as trained


@dataclass
class GenerateConfig:
    """`python -m vislora.generate`"""

    prompt: list[str] = MISSING
    adapter: UsedAdapters = field(default_factory=UsedAdapters)
    weights: list[float] | None = None  # a factor for each of several adapters; 1 by default
    scales: list[float] | None = None  # draw every picture at each of these, in place of adapter.scale
    model: PipelineConfig = MISSING  # name=auto: what the adapter was trained on
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 25
    guidance: float = 5.0
    negative_prompt: str | None = None
    size: int | None = None  # pixels of a side; what the pipeline was made for by default
    precision: Precision = Precision.auto  # of the weights, on a GPU; float32 on a CPU

    def __post_init__(self) -> None:
        _check_drawing(self)
        for name, values in (("prompt", self.prompt), ("seeds", self.seeds), ("scales", self.scales)):
            if values is not None and not values:
                raise ConfigError(f"{name} is empty; give at least one")
        if self.negative_prompt is not None and self.guidance <= 1.0:
            raise ConfigError(
                f"guidance={self.guidance} draws without a negative prompt; raise it above 1, or leave the prompt out"
            )
        if self.scales and not self.adapter.files:
            raise ConfigError("scales=[…] are an adapter's; give one with adapter=FILE")
        count = len(self.adapter.files)
        if self.weights is not None and (count < 2 or len(self.weights) != count):
            raise ConfigError(f"weights={self.weights} for {count} adapters; weights are for several, one for each")


def _check_truncation(config: Any) -> None:
    """Refuse an SVD that isn't told where to end."""
    _check_ranges(config, rank=(1, math.inf))
    if config.rank is None and config.energy is None:
        raise ConfigError("give a rank=8, or the share of each update to keep: energy=0.9")
    if config.energy is not None and not 0.0 < config.energy <= 1.0:
        raise ConfigError(f"energy={config.energy}: expected more than 0 and at most 1")


@dataclass
class ExtractConfig:
    """`python -m vislora.extract`"""

    tuned: str = MISSING  # the folder of a fully tuned model, or a .safetensors file
    base: str | None = None  # the base weights, a .safetensors file; those the folder names by default
    rank: int | None = None  # the largest of a layer
    energy: float | None = None  # share of each difference's squared norm to keep, in (0, 1]
    trained: list[str] = field(default_factory=list)  # modules to keep in full; a folder's classifier always is
    ignore: list[str] = field(default_factory=list)  # patterns of changed tensors to leave out: ['*.bias']
    out: str = MISSING

    def __post_init__(self) -> None:
        _check_truncation(self)


@dataclass
class ResizeConfig:
    """`python -m vislora.resize`"""

    adapter: str = MISSING  # of any format
    rank: int | None = None  # of all layers; with energy, the largest of a layer
    energy: float | None = None  # share of each update's squared norm to keep, in (0, 1]
    out: str = MISSING

    def __post_init__(self) -> None:
        _check_truncation(self)


class Blending(Enum):
    """How adapters become one; see `vislora.lora.algebra.blend`."""

    svd = "svd"
    cat = "cat"
    linear = "linear"


@dataclass
class BlendConfig:
    """`python -m vislora.blend`"""

    adapter: list[str] = MISSING  # of any format
    weights: list[float] = MISSING  # one for each adapter
    how: Blending = Blending.svd
    rank: int | None = None  # of how=svd; the largest among the adapters' by default
    head: int | None = None  # whose head, and classes, the result takes: 0 for the first adapter's
    out: str = MISSING

    def __post_init__(self) -> None:
        if len(self.adapter) < 2 or len(self.weights) != len(self.adapter):
            raise ConfigError(
                f"weights={[*self.weights]} for {len(self.adapter)} adapters: give two or more, and a number for each"
            )
        _check_ranges(self, rank=(1, math.inf), head=(0, len(self.adapter) - 1))
        if self.rank is not None and self.how is not Blending.svd:
            raise ConfigError(f"rank={self.rank} belongs to how=svd; {self.how.value} has its own")


@dataclass
class DoctorConfig:
    """`python -m vislora.doctor`"""

    models: str = "*"  # a pattern of timm's names
    real: int | None = 1  # how many of each attention class are run with weights, the smallest first; null: all
    workers: int = 2  # processes, each with one thread; 0: this one

    def __post_init__(self) -> None:
        _check_ranges(self, real=(0, math.inf), workers=(0, math.inf))


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


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as JSON values."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def data_to_dict(config: BaseData) -> dict[str, Any]:
    """A data set's settings as JSON values, with the name of its option."""
    option = next(name for name, schema in DATA_OPTIONS.items() if type(config) is schema)
    return {"option": option} | to_dict(config)


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
        raise ConfigError(f"data={option}: {str(error).splitlines()[0]}") from None


def literal(value: Any) -> Any:
    """A value in which texts mean themselves: to OmegaConf ${x} in one stands for another setting."""
    if isinstance(value, dict):
        return {key: literal(own) for key, own in value.items()}
    if isinstance(value, list):
        return [literal(own) for own in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
