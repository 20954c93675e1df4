"""What is tuned: `model=OPTION`."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vislora.config.ranges import check_ranges
from vislora.errors import ConfigError


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
    gradient_checkpointing: bool = False  # in training: a third more time, far less memory

    def __post_init__(self) -> None:
        for key in ("revision", "variant"):
            if self.name == "auto" and getattr(self, key) is not None:
                raise ConfigError(
                    f"model.{key}={getattr(self, key)} is of a model that is named, and by default an adapter's own is "
                    "taken; give model.name too"
                )


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
        check_ranges(self, "model.", img_size=(1, math.inf), drop_path=(0, 1))
