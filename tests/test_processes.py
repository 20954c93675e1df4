"""Two processes train as one does."""

import json
import subprocess
import sys

import pytest

from vislora.compose import configure
from vislora.evaluate import evaluate

COMMON = [
    "recipe=vit_birds",
    "data.species=[mallard,barn owl,blue jay]",
    "data.train_per_species=7",
    "data.val_per_species=3",
    "data.test_per_species=5",
    "trainer.batch_size=6",
    "trainer.epochs=3",
    "trainer.precision=fp32",
    "trainer.progress=false",
    "logger.trackers=[]",
]

BUSY = """
import datetime, time
from torch.distributed import distributed_c10d
from vislora.config.training import Precision
from vislora.precision import new_accelerator, own_device
distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=2)  # 10 minutes on GPUs
{first}
accelerator = new_accelerator(Precision.fp32)
with accelerator.main_process_first():
    time.sleep(6 if accelerator.is_main_process else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "own_device()"])
def test_a_process_waits_for_the_first_one_longer_than_torch_would(two_processes, tmp_path, first):
    (tmp_path / "busy.py").write_text(BUSY.format(first=first))
    done = subprocess.run([*two_processes, "busy.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one(two_processes, tmp_path):
    curves, scores = [], []
    for count, launch in {1: [sys.executable], 2: two_processes}.items():
        name = str(count)
        words = [*launch, "-m", "vislora.train", *COMMON, f"hydra.run.dir={tmp_path / name}"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (state,) = (tmp_path / name / "checkpoints").glob("*/state.json")
        assert json.loads(state.read_text())["run"]["processes"] == count
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([(row["step"], row.get("loss", row.get("val_loss"))) for row in rows])
        scores.append(json.loads((tmp_path / name / "evaluation" / "evaluation.json").read_text()))
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert [loss for _, loss in curves[1]] == pytest.approx([loss for _, loss in curves[0]], rel=1e-3)
    assert scores[1]["images"] == scores[0]["images"] == 15
    assert scores[1]["top1"] == scores[0]["top1"]


@pytest.mark.slow
def test_a_process_without_a_picture_to_validate_on_is_not_waited_for(two_processes, tmp_path):
    words = [*two_processes, "-m", "vislora.train", *COMMON, f"hydra.run.dir={tmp_path / 'run'}"]
    words += ["data.val_per_species=1", "data.test_per_species=0", "adapter.pissa=true"]  # whose start is in buffers
    words += ["trainer.epochs=2", "trainer.validate_every=1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_top1" in row] == [4, 8]


@pytest.mark.slow
def test_all_processes_test_the_batchnorm_that_is_exported(two_processes, tmp_path):
    words = [*two_processes, "-m", "vislora.train", *COMMON, f"hydra.run.dir={tmp_path / 'run'}"]
    words += ["model=timm", "model.name=resnet10t", "model.weights=random", "model.img_size=64", "adapter=full"]
    words += ["data.augment.patch_drop=0", "data.val_per_species=0", "trainer.epochs=1"]  # a validation would share it
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = [f"adapter={tmp_path / 'run' / 'model'}", "batch_size=6", "precision=fp32", "maps=0", "resamples=2"]
    (again,) = evaluate(configure("evaluate", words))
    again.evaluation.write(tmp_path / "again")
    first, second = ((tmp_path / name / "predictions.csv").read_text() for name in ("run/evaluation", "again"))
    assert first == second


@pytest.mark.slow
def test_a_search_goes_on_after_its_first_run(two_processes, tmp_path):
    words = [*two_processes, "-m", "vislora.train", "--multirun", *COMMON, "optim.lr=1e-3,2e-3", "trainer.epochs=1"]
    words += ["data.test_per_species=0", f"hydra.sweep.dir={tmp_path / 'runs'}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "runs").glob("*/summary.json")]) == 2
