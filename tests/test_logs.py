"""Figures and settings reach the trackers as they reach metrics.jsonl."""

import importlib.machinery
import importlib.util
import json
import math

import pytest
import yaml
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vislora.compose import configure
from vislora.config.training import LoggerConfig, Tracker
from vislora.errors import ConfigError
from vislora.logs import MetricLog, start_trackers, trackers


@pytest.fixture
def logged(tmp_path):
    config = configure("train", ["recipe=vit_birds", "optim.lr=0.002", "adapter.blocks=last:2"])
    accelerator = Accelerator(cpu=True, log_with=trackers(config.logger), project_dir=tmp_path)
    start_trackers(accelerator, config, tmp_path)
    log = MetricLog(tmp_path, accelerator)
    for step in range(3):
        log.write(step, {"loss": 1.5 / (step + 1), "grad_norm": math.inf if step == 1 else 2.0})
    accelerator.end_training()
    return tmp_path


def test_tensorboard_shows_the_figures_of_metrics_jsonl(logged):
    events = EventAccumulator(str(logged / "vislora"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    rows = [json.loads(line) for line in (logged / "metrics.jsonl").read_text().splitlines()]
    assert shown == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert [row["grad_norm"] for row in rows] == [2.0, None, 2.0]


def test_runs_can_be_compared_by_their_settings(logged):
    (file,) = (logged / "vislora").rglob("hparams.yml")
    settings = yaml.safe_load(file.read_text())
    assert (settings["optim.lr"], settings["adapter.blocks"], settings["trainer.patience"]) == (0.002, "last:2", "null")
    assert settings["data.augment.hflip"] == 0.5
    assert json.loads(settings["adapter.targets"]) == ["qkv", "o", "mlp"]
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())


def test_a_line_that_a_crash_cut_off_is_left_behind(tmp_path):
    log = MetricLog(tmp_path, Accelerator(cpu=True))
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.5})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.continue_from(tmp_path, 2, None)
    log.write(3, {"loss": 0.5})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.5), (2, 1.5), (3, 0.5)]


def test_trackers_are_those_that_are_named():
    assert trackers(LoggerConfig()) == ["tensorboard"]
    assert trackers(LoggerConfig(trackers=[])) == []
    assert trackers(LoggerConfig(trackers=[Tracker.tensorboard])) == ["tensorboard"]


@pytest.mark.parametrize("found", ["nothing", "the folder of its runs"])
def test_a_tracker_that_is_named_has_to_be_installed(found, monkeypatch):
    spec = None if found == "nothing" else importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=r"wandb isn't installed; pip install wandb, or leave it out"):
        trackers(LoggerConfig(trackers=[Tracker.wandb]))
    assert trackers(LoggerConfig()) == []
