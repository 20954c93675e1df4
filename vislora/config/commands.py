"""What the commands beside training ask for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vislora.config.data import DataConfig
from vislora.config.model import ModelConfig, PipelineConfig
from vislora.config.ranges import check_ranges
from vislora.config.training import Precision
from vislora.errors import ConfigError


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
    check_ranges(config, steps=(1, math.inf))
    config.size = _width_and_height(config.size)
    _check_finite(guidance=[config.guidance], scales=config.scales or [])  # pictures would be black
    if wrong := [seed for seed in config.seeds if not -(2**63) <= seed < 2**64]:
        raise ConfigError(f"seeds: {wrong[0]} is no number of 64 bits")


def _width_and_height(size: Any) -> tuple[int, int] | None:
    """Of pictures to draw, as they were asked for."""
    if size is None:
        return None
    pair = (size, size) if type(size) is int else size
    if not isinstance(pair, list | tuple) or [type(side) for side in pair] != [int, int] or min(pair) < 1:
        raise ConfigError(f"size={size!r}: expected pixels, size=512 for both sides, or size=[WIDTH,HEIGHT]")
    return tuple(pair)


def _check_finite(**settings: Sequence[float]) -> None:
    for key, values in settings.items():
        if wrong := [value for value in values if not math.isfinite(value)]:
            raise ConfigError(f"{key}={wrong[0]}: expected a finite number")


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

    # a file with a prompt a line (`prompt`, `prompt | label`, or `# a remark`; .jsonl: {"prompt": …, "label": …}), or a
    # list of prompts; by default the captions held out from the adapter's training, or where none were all of its own
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
    size: Any = None  # pixels: 512, or [768,512] of width and height; what the pipeline was made for by default
    drawn_at_once: int = 8


@dataclass
class EvaluateConfig(PictureFigures, RecognitionFigures):
    """`python -m vislora.evaluate`"""

    adapter: list[str] = MISSING  # adapters, or merged or fully tuned classifiers; one needs no brackets
    resamples: int = 2000  # of the images, for the bootstrap's intervals
    seed: int = 0
    batch_size: int = 64
    precision: Precision = Precision.auto  # pictures are drawn in it on a GPU, on a CPU in float32

    def __post_init__(self) -> None:
        check_ranges(self, resamples=(2, math.inf), seed=(0, 2**63 - 1), batch_size=(1, math.inf))
        check_ranges(self, **dict.fromkeys(("maps", "mistakes", "workers"), (0, math.inf)))
        _check_drawing(self)
        check_ranges(self, drawn_at_once=(1, math.inf))
        if self.split not in ("train", "val", "test"):
            raise ConfigError(f"split={self.split}: expected train, val or test")
        if self.calibrate and self.split == "val":
            raise ConfigError(
                "calibrate=true fits a temperature to split=val, and would look better there than it is; give "
                "split=test, or leave calibrate out"
            )
        if Baseline.probe in self.baselines and self.split == "train":
            raise ConfigError(
                "baselines=[probe] fits a linear probe to split=train, and it would look better there than it is; give "
                "split=val or split=test, or leave the probe out"
            )
        if self.backbone.drop_path:
            raise ConfigError(
                f"backbone.drop_path={self.backbone.drop_path:g} has no effect: paths are dropped in training alone; "
                "leave it out"
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
    out: str | None = None  # a .csv or .json file to write to, in place of the terminal
    batch_size: int = 64
    precision: Precision = Precision.fp32

    def __post_init__(self) -> None:
        check_ranges(self, top=(1, math.inf), batch_size=(1, math.inf))
        if self.out is not None and not self.out.endswith((".csv", ".json")):
            raise ConfigError(f"out={self.out}: expected the name of a .csv or a .json file")
        if not self.images:
            raise ConfigError("images=[]: expected at least one picture or folder")


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

    def __post_init__(self) -> None:
        if self.weights is not None and self.to is not ExportTo.merged:
            raise ConfigError(f"weights={self.weights} are for to=merged; to={self.to.value} writes the adapter alone")
        if self.pipeline is not None and self.to is ExportTo.merged:
            raise ConfigError(
                f"pipeline={self.pipeline} is for to=diffusers, kohya or peft; to=merged writes timm models"
            )
        if self.to in (ExportTo.merged, ExportTo.peft) and self.out.endswith(".safetensors"):
            raise ConfigError(
                f"out={self.out}: to={self.to.value} writes a folder, with the weights in it; give a folder's name"
            )


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
    size: Any = None  # pixels: 512, or [768,512] of width and height; what the pipeline was made for by default
    precision: Precision = Precision.auto  # of the weights, on a GPU; float32 on a CPU

    def __post_init__(self) -> None:
        _check_drawing(self)
        _check_finite(**{"adapter.scale": [self.adapter.scale]}, weights=self.weights or [])
        for name, values in (("prompt", self.prompt), ("seeds", self.seeds), ("scales", self.scales)):
            if values is not None and not values:
                raise ConfigError(f"{name} is empty; give at least one")
        for text in (*self.prompt, self.negative_prompt or ""):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # of a terminal that isn't in UTF-8
                raise ConfigError(f"{text!r} holds half a character; write the prompt in UTF-8")
        if self.negative_prompt is not None and self.guidance <= 1.0:
            raise ConfigError(
                f"guidance={self.guidance} draws without a negative prompt; raise it above 1, or leave the prompt out"
            )
        if self.scales and not self.adapter.files:
            raise ConfigError("scales=[…] are an adapter's; give one with adapter=FILE")
        if self.adapter.scale != 1.0 and not self.adapter.files:
            raise ConfigError(f"adapter.scale={self.adapter.scale} is an adapter's; give one with adapter=FILE")
        count = len(self.adapter.files)
        if self.weights is not None and (count < 2 or len(self.weights) != count):
            raise ConfigError(f"weights={self.weights} for {count} adapters; weights are for several, one for each")


def _check_truncation(config: Any) -> None:
    """Refuse an SVD that isn't told where to end."""
    check_ranges(config, rank=(1, math.inf))
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
    component: str | None = None  # of a pipeline, that the files are of, as unet: then diffusers' file is written
    out: str = MISSING

    def __post_init__(self) -> None:
        _check_truncation(self)
        if self.component is None and self.out.endswith(".safetensors"):
            raise ConfigError(
                f"out={self.out}: a single model's adapter is a folder, as PEFT has it; give a folder's name, or what "
                "it is in a pipeline, as component=unet, for diffusers' file"
            )


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
        _check_finite(weights=self.weights)
        if not any(self.weights):
            raise ConfigError(f"weights={[*self.weights]} leave nothing of the adapters; give one that isn't 0")
        check_ranges(self, rank=(1, math.inf), head=(0, len(self.adapter) - 1))
        if self.rank is not None and self.how is not Blending.svd:
            raise ConfigError(f"rank={self.rank} belongs to how=svd; {self.how.value} has its own")


@dataclass
class DoctorConfig:
    """`python -m vislora.doctor`"""

    models: str = "*"  # a pattern of timm's names
    real: int | None = 1  # how many of each attention class are run with weights, the smallest first; null: all
    workers: int = 2  # processes, each with one thread; 0: this one

    def __post_init__(self) -> None:
        check_ranges(self, real=(0, math.inf), workers=(0, math.inf))
