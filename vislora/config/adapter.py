"""How the base model is tuned: `adapter=OPTION`."""

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vislora.config.ranges import check_ranges
from vislora.errors import ConfigError


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
    """A projection in a diffusion pipeline's UNet or transformer."""

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
    rank_pattern: dict[str, int] = field(default_factory=dict)  # pattern of a layer's name: its rank; the first counts
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    start: str | None = None  # an adapter to go on from; its own layers, ranks, scales and kind count then

    def __post_init__(self) -> None:
        check_ranges(self, "adapter.", rank=(1, math.inf), dropout=(0, 0.99))
        alphas = {f"alpha_pattern.{name}": alpha for name, alpha in self.alpha_pattern.items()}
        for key, alpha in {"alpha": self.alpha, **alphas}.items():
            if not 0.0 < alpha < math.inf:  # of 0 the proof that adapters act would blame the model
                raise ConfigError(f"adapter.{key}={alpha}: expected more than 0")
        for name, rank in self.rank_pattern.items():
            if rank < 1:
                raise ConfigError(f"adapter.rank_pattern.{name}={rank}: expected 1 or more")
        blocks = [*self.blocks] if isinstance(self.blocks, list | tuple) else [self.blocks]
        if self.blocks is not None and not (blocks and all(type(block) in (int, str) for block in blocks)):
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
    # adapt q, k, v and o of the text encoders too, whatever targets and blocks say of the denoiser; not of T5, which
    # diffusers wouldn't load
    text_encoder: bool = False

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
