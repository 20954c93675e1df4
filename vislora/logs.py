"""Figures of a run: metrics.jsonl always, TensorBoard or Weights & Biases beside it through accelerate."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vislora.config.training import LoggerConfig, Tracker, TrainConfig
from vislora.config.values import to_dict
from vislora.errors import ConfigError
from vislora.files import METRICS, naming, write_text


def trackers(config: LoggerConfig) -> list[str]:
    """The trackers to use, by accelerate's names; TensorBoard where it is installed if none are named.

    Raises:
        ConfigError: one that is named isn't installed.
    """
    if config.trackers is not None:
        named = [tracker.value for tracker in config.trackers]
        if absent := [name for name in named if not _installed(name)]:
            raise ConfigError(f"logger.trackers: {absent[0]} isn't installed; pip install {absent[0]}, or leave it out")
        return named
    return [Tracker.tensorboard.value] if _installed(Tracker.tensorboard.value) else []


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of its name, as wandb's of runs, has none


def start_trackers(accelerator: Accelerator, config: TrainConfig, out: Path) -> None:
    """Open the accelerator's trackers, each with every setting of the run by its dotted key (lists, and what is left
    open, as JSON), so that runs can be compared by them."""
    own = {"wandb": {"dir": str(out), "name": "/".join(out.resolve().parts[-2:])}}
    accelerator.init_trackers(config.logger.project, _by_dotted_key(to_dict(config)), own)


def _by_dotted_key(settings: dict[str, Any]) -> dict[str, bool | int | float | str]:
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{inner}": its for inner, its in _by_dotted_key(value).items()}
        else:
            found[key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


class MetricLog:
    """Appends rows to out/metrics.jsonl and hands them to the accelerator's trackers; the main process writes."""

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.path = out / METRICS
        self.rows = 0
        self._accelerator = accelerator

    def continue_from(self, run: Path, step: int, rows: int | None) -> None:
        """Take over the rows of an earlier run up to a step; of these the first ones, where their number is known. A
        run that was stopped has validated once more after its checkpoint, as one that goes on doesn't."""
        if not self._accelerator.is_main_process:
            return
        earlier = run / self.path.name
        # behind the last line's end there is nothing, or what a crash cut off
        lines = earlier.read_text(encoding="utf-8").split("\n")[:-1] if earlier.is_file() else []
        kept = [line for line in lines[:rows] if json.loads(line)["step"] <= step]
        self.rows = len(kept)
        write_text("".join(line + "\n" for line in kept), self.path)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append one row; null for what is no finite number, as the gradient's norm of a step that fp16 skipped."""
        self._accelerator.log(figures, step=step)
        if not self._accelerator.is_main_process:
            return
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            told = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            file.write(json.dumps({"step": step} | told, allow_nan=False) + "\n")
        self.rows += 1
