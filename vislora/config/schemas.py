"""Which class of settings stands behind each command, and behind each option of a config group.

An option of conf/GROUP/ names its class as `defaults: [NAME]`; a new class is a row here.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from vislora.config.adapter import FullAdapter, LoraAdapter, PipelineLora, ProbeAdapter
from vislora.config.commands import (
    BlendConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    GenerateConfig,
    PredictConfig,
    ResizeConfig,
)
from vislora.config.data import DATA_OPTIONS
from vislora.config.model import ModelConfig, PipelineConfig
from vislora.config.training import (
    DiffusionObjective,
    LoggerConfig,
    OptimConfig,
    RecognitionObjective,
    TrainConfig,
    TrainerConfig,
)
from vislora.paths import CONF

SCHEMAS = [  # group (None: a command), name, class
    (None, "train_schema", TrainConfig),
    (None, "evaluate_schema", EvaluateConfig),
    (None, "predict_schema", PredictConfig),
    (None, "export_schema", ExportConfig),
    (None, "generate_schema", GenerateConfig),
    (None, "extract_schema", ExtractConfig),
    (None, "resize_schema", ResizeConfig),
    (None, "blend_schema", BlendConfig),
    (None, "doctor_schema", DoctorConfig),
    ("model", "schema", ModelConfig),
    ("model", "pipeline_schema", PipelineConfig),
    *(("data", f"{option}_schema", schema) for option, schema in DATA_OPTIONS.items()),
    ("adapter", "lora_schema", LoraAdapter),
    ("adapter", "pipeline_lora_schema", PipelineLora),
    ("adapter", "probe_schema", ProbeAdapter),
    ("adapter", "full_schema", FullAdapter),
    ("objective", "recognition_schema", RecognitionObjective),
    ("objective", "diffusion_schema", DiffusionObjective),
    ("optim", "schema", OptimConfig),
    ("trainer", "schema", TrainerConfig),
    ("logger", "schema", LoggerConfig),
]

WITH_GROUP = ("train", "preflight")  # commands with the settings of training, whose adapter=… is a config group


def options_of(group: str, fits: Callable[[type], bool]) -> list[str]:
    """The options of a group whose settings are of a class that fits."""
    schemas = {name: schema for of, name, schema in SCHEMAS if of == group}
    files = sorted((CONF / group).glob("*.yaml"))
    return [file.stem for file in files if fits(schemas[OmegaConf.load(file).defaults[0]])]


def groups_of(name: str) -> list[str]:
    """The groups that a command chooses options of."""
    defaults = OmegaConf.load(CONF / f"{_composed_as(name)}.yaml").defaults
    return [group for entry in defaults if not isinstance(entry, str) for group in entry if "/" not in group]


@cache
def known_keys(name: str) -> dict[str, Any]:
    """The settings of a command, and as GROUP.KEY those of the options of its groups, chosen or not; by their types."""
    own, groups = _composed_as(name), groups_of(name)
    keys: dict[str, Any] = {}  # options of a group have settings in common
    for group, option, schema in SCHEMAS:
        if group not in groups and option != f"{own}_schema":
            continue
        for f in fields(schema):
            key = f"{group}.{f.name}" if group else f.name
            keys[key] = f.type
            if is_dataclass(f.type):
                keys |= {f"{key}.{g.name}": g.type for g in fields(f.type)}
    return keys


def _composed_as(name: str) -> str:
    """The command whose settings a command takes."""
    return "train" if name in WITH_GROUP else name
