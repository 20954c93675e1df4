"""How it is trained: `objective=OPTION`, `optim`, `trainer` and `logger`; and all of a training together."""

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from vislora.config.adapter import AdapterConfig
from vislora.config.data import BaseData
from vislora.config.model import BaseModel
from vislora.config.ranges import check_ranges, check_shares
from vislora.errors import ConfigError


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


@dataclass
class ObjectiveConfig:
    """What is optimised."""


@dataclass
class RecognitionObjective(ObjectiveConfig):
    """Cross-entropy on class labels."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self, "objective.", "label_smoothing")


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
        check_ranges(
            self, "objective.", caption_dropout=(0, 1), preview_steps=(1, math.inf), before_after=(0, math.inf)
        )
        check_ranges(self, "objective.", noise_offset=(0, math.inf), timestep_shift=(0.01, 100))
        check_ranges(self, "objective.", guidance=(-math.inf, math.inf))
        if self.prompts is not None and not self.prompts:
            raise ConfigError("objective.prompts is empty; give at least one, or null for captions of the data")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0.0:
            raise ConfigError(f"objective.min_snr_gamma={self.min_snr_gamma}: expected more than 0, or null")


@dataclass
class OptimConfig:
    """AdamW with warm-up and cosine decay to zero."""

    lr: float = 2e-3  # of adapters (of the whole model in full fine-tuning)
    b_lr_ratio: float = 1.0  # LoRA+: the rate of lora_B over that of lora_A
    head_lr: float | None = None  # of the head; lr by default
    weight_decay: float = 0.01  # on matrices; never on biases, norms, embeddings and scales
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: float = 0.1  # share of all steps
    clip_norm: float | None = 1.0  # of the gradient; null: no clipping

    def __post_init__(self) -> None:
        check_ranges(self, "optim.", **dict.fromkeys(("lr", "b_lr_ratio", "head_lr", "clip_norm"), (0, math.inf)))
        check_ranges(self, "optim.", weight_decay=(0, math.inf), warmup=(0, 1))
        if self.clip_norm == 0.0:
            raise ConfigError("optim.clip_norm=0 would leave nothing of the gradient; without clipping it is null")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas}: expected two numbers from 0 to below 1")


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
    checkpoint_every: int | None = None  # steps, an epoch's by default; at validations and the end as well
    resume: str | None = None  # a run folder or one of its checkpoints
    stop_at: int | None = None  # the step to end at and export, the schedule being that of all epochs
    progress: bool = True

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulation", "validate_every")
        counts += ("patience", "preview_every", "checkpoint_every", "stop_at")
        check_ranges(self, "trainer.", **dict.fromkeys(counts, (1, math.inf)), workers=(0, math.inf))
        check_shares(self, "trainer.", "ema")
        if self.resume == "":  # as of an unset shell variable: it would be the current folder
            raise ConfigError("trainer.resume is empty; give a run folder or one of its checkpoints, or leave it out")


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
        check_ranges(self, seed=(0, 2**63 - 1))
