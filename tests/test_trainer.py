"""The loop: what a step is, and that a run can be stopped, divided and resumed without taking another path."""

import copy
import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vislora.checkpoint import (
    Checkpoint,
    Progress,
    _load_optimizer_tensors,
    _optimizer_tensors,
    frozen_key,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
)
from vislora.config.adapter import Bias, LoraAdapter, Target
from vislora.config.data import AugmentConfig
from vislora.config.training import Keep, OptimConfig, Precision, TrainerConfig
from vislora.data.order import Order, eval_loader, train_loader
from vislora.data.splits import ImageSplit, Pixels
from vislora.data.transforms import Preprocessing, eval_transform, train_transform
from vislora.errors import ConfigError, TrainingError
from vislora.logs import MetricLog
from vislora.lora import Adapters
from vislora.objectives.recognition import Recognition
from vislora.precision import new_accelerator
from vislora.tasks.recognition import adapt
from vislora.trainer import Trainer, make_optimizer, rate_factor

IMAGES = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
CLASSES = ("dark", "light", "red")


@pytest.fixture(scope="module")
def split():
    """Noise around a class colour; 22 pictures, so that no batch size divides it."""
    rng = np.random.default_rng(0)
    colours = np.array([[60, 60, 60], [190, 190, 190], [200, 60, 60]])
    labels = [i % 3 for i in range(22)]
    pixels = np.clip(colours[labels][:, None, None] + rng.normal(0, 40, (22, 32, 32, 3)), 0, 255).astype(np.uint8)
    return ImageSplit(CLASSES, labels, [str(i) for i in range(22)], Pixels(pixels))


class Stopped(Exception):
    """Stands for a power cut."""


class StopsAt(Recognition):
    """Recognition that dies when asked for the losses of a given call."""

    calls_left: int

    def losses(self, model, batch):
        object.__setattr__(self, "calls_left", self.calls_left - 1)
        if self.calls_left < 0:
            raise Stopped
        return super().losses(model, batch)


def make_trainer(
    split, out, *, objective=None, adapter=None, optim=None, validate=True, precision=Precision.fp32, **settings
):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=3
    )
    adapt(model, adapter or LoraAdapter(dropout=0.1))
    config = TrainerConfig(**{"epochs": 3, "batch_size": 6, "progress": False} | settings)
    order = Order(len(split), config.batch_size, 0, config.accumulation)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = new_accelerator(precision, cpu=True)
    augment = train_transform(IMAGES, AugmentConfig(crop_scale=0.5))
    plain = eval_transform(IMAGES)
    last = config.epochs * order.steps_per_epoch
    torch.manual_seed(0)
    return Trainer(
        model=model,
        objective=objective or Recognition(),
        order=order,
        batches=lambda step: train_loader(split, augment, order, step, last, config.workers),
        validation=eval_loader(split, plain, 5, 0) if validate else None,
        head=("head.",),
        optim=optim or OptimConfig(lr=3e-3),
        config=config,
        accelerator=accelerator,
        log=MetricLog(out, accelerator),
        out=out,
        run={"seed": 0},
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def assert_same_bits(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


RESUMED = {
    "last": (Keep.last, LoraAdapter(dropout=0.1)),
    "best": (Keep.best, LoraAdapter(dropout=0.1)),
    "DoRA": (Keep.best, LoraAdapter(dropout=0.1, dora=True)),
    "PiSSA": (Keep.best, LoraAdapter(pissa=True)),
    "biases and norms": (Keep.best, LoraAdapter(bias=Bias.all, trained=["norms"])),
}


@pytest.mark.parametrize(("keep", "adapter"), RESUMED.values(), ids=RESUMED.keys())
def test_a_run_cut_off_in_mid_epoch_resumes_to_the_same_bits(split, tmp_path, keep, adapter):
    straight = make_trainer(split, tmp_path / "straight", adapter=adapter, checkpoint_every=3, keep=keep)
    straight.fit()

    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 7)  # 4 steps an epoch: in the middle of the second one
    cut = make_trainer(split, tmp_path / "cut", objective=objective, adapter=adapter, checkpoint_every=3, keep=keep)
    with pytest.raises(Stopped):
        cut.fit()
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").glob("step_*")] == ["step_00000006"]

    resumed = make_trainer(
        split, tmp_path / "resumed", adapter=adapter, checkpoint_every=3, keep=keep, resume=str(tmp_path / "cut")
    )
    for name, buffer in resumed.model.named_buffers():
        if "start_" in name:  # another machine's SVD may differ in its last bits: the checkpoint's counts
            buffer.mul_(1.5)
    progress = resumed.fit()
    assert progress.step == 12
    assert_same_bits(dict(resumed.model.named_buffers()), dict(straight.model.named_buffers()))
    assert_same_bits(parameters(resumed), parameters(straight))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 8), ({"checkpoint_every": 5, "validate_every": 9}, 10), ({"checkpoint_every": 99, "validate_every": 2}, 8)],
    ids=["each epoch", "each 5 steps", "at validations"],
)
def test_checkpoints_are_as_far_apart_as_wished_and_go_with_validations(split, tmp_path, settings, kept):
    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 11)  # 4 steps an epoch
    with pytest.raises(Stopped):
        make_trainer(split, tmp_path, objective=objective, **settings).fit()
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{kept:08d}"]


def test_a_run_ends_where_wished_on_the_path_of_the_whole_run(split, tmp_path):
    whole = make_trainer(split, tmp_path / "whole", keep=Keep.last)
    whole.fit()
    short = make_trainer(split, tmp_path / "short", keep=Keep.last, stop_at=6)  # in mid-epoch
    assert short.fit().step == 6
    steps = [row for row in rows(tmp_path / "short") if "lr" in row]
    assert steps == [row for row in rows(tmp_path / "whole") if "lr" in row][:6]
    assert [row["step"] for row in rows(tmp_path / "short") if "val_top1" in row] == [4, 6]

    resumed = make_trainer(split, tmp_path / "resumed", keep=Keep.last, resume=str(tmp_path / "short"))
    assert resumed.fit().step == 12
    assert_same_bits(parameters(resumed), parameters(whole))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")  # without the look that it took where it stopped


def test_a_run_that_is_exported_twice_where_it_stopped_notes_that_figure_once(split, tmp_path):
    for resume in (None, str(tmp_path)):
        make_trainer(split, tmp_path, stop_at=6, resume=resume).fit()
        assert [row["step"] for row in rows(tmp_path) if "val_top1" in row] == [4, 6]


@pytest.mark.parametrize("keep", Keep)
def test_what_a_run_reached_before_it_broke_off_can_be_exported(split, tmp_path, keep):
    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 11)  # 4 steps an epoch
    with pytest.raises(Stopped):
        make_trainer(split, tmp_path / "broken", objective=objective, keep=keep).fit()
    file = "best.safetensors" if keep is Keep.best else "step_00000008/model.safetensors"
    reached = read_tensors(tmp_path / "broken" / "checkpoints" / file)

    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 0)  # no more steps
    rest = make_trainer(
        split, tmp_path / "rest", objective=objective, keep=keep, resume=str(tmp_path / "broken"), stop_at=1
    )
    assert rest.fit().step == 8
    assert_same_bits(parameters(rest), {name: reached[name] for name in parameters(rest)})
    assert Checkpoint.open(tmp_path / "rest").progress.step == 8  # it can go on without the broken one's folder


@pytest.mark.parametrize("ema", [None, 0.9])
def test_batchnorm_resumes_to_the_same_bits_the_count_of_its_batches_among_them(split, tmp_path, ema):
    def trainer(name, **settings):
        made = make_trainer(split, tmp_path / name, epochs=2, ema=ema, **settings)
        made.model = timm.create_model("resnet10t", num_classes=3)
        return made

    straight = trainer("straight")
    straight.fit()
    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 5)  # 4 steps an epoch
    with pytest.raises(Stopped):
        trainer("cut", objective=objective).fit()
    resumed = trainer("resumed", resume=str(tmp_path / "cut"))
    resumed.fit()
    assert_same_bits(resumed.model.state_dict(), straight.model.state_dict())


def test_a_run_resumed_twice_still_takes_the_same_path(split, tmp_path):
    straight = make_trainer(split, tmp_path / "straight", checkpoint_every=1)
    straight.fit()
    previous = None
    for turn, calls in enumerate([2, 3, 100]):
        objective = StopsAt()
        object.__setattr__(objective, "calls_left", calls)
        resume = str(tmp_path / f"part{turn - 1}") if turn else None
        previous = make_trainer(split, tmp_path / f"part{turn}", objective=objective, checkpoint_every=1, resume=resume)
        if calls < 100:
            with pytest.raises(Stopped):
                previous.fit()
        else:
            previous.fit()
    assert_same_bits(parameters(previous), parameters(straight))


def test_the_time_of_a_resumed_run_is_that_of_all_its_steps(split, tmp_path):
    class Slow(StopsAt):
        def losses(self, model, batch):
            time.sleep(0.2)
            return super().losses(model, batch)

    objective = Slow()
    object.__setattr__(objective, "calls_left", 6)  # the checkpoint is of step 4, the epoch's end
    with pytest.raises(Stopped):
        make_trainer(split, tmp_path / "cut", objective=objective, epochs=2).fit()
    progress = make_trainer(split, tmp_path / "resumed", epochs=2, resume=str(tmp_path / "cut")).fit()
    earlier = Checkpoint.open(tmp_path / "cut").progress.seconds
    assert progress.seconds > earlier > 4 * 0.2


def test_a_run_resumed_in_its_own_folder_takes_back_what_it_logged_after_the_checkpoint(split, tmp_path):
    settings = {"batch_size": 1, "epochs": 2}
    make_trainer(split, tmp_path / "straight", **settings).fit()
    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 35)  # the checkpoint is of step 22, the last epoch's end
    with pytest.raises(Stopped):
        make_trainer(split, tmp_path / "cut", objective=objective, **settings).fit()
    assert rows(tmp_path / "cut")[-1]["step"] > 22
    make_trainer(split, tmp_path / "cut", resume=str(tmp_path / "cut"), **settings).fit()
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")


def test_the_newest_checkpoint_counts_where_an_older_one_was_not_removed(split, tmp_path):
    make_trainer(split, tmp_path, epochs=1).fit()
    for step in (3, 5):
        shutil.copytree(tmp_path / "checkpoints" / "step_00000004", tmp_path / "checkpoints" / f"step_{step:08d}")
    assert Checkpoint.open(tmp_path).folder.name == "step_00000005"


def test_a_checkpoint_knows_its_run_from_within_too(split, tmp_path, monkeypatch):
    make_trainer(split, tmp_path / "first", epochs=2, stop_at=4).fit()
    monkeypatch.chdir(tmp_path / "first" / "checkpoints" / "step_00000004")
    for name, resume in (("second", "."), ("third", "../step_00000004")):
        make_trainer(split, tmp_path / name, epochs=2, resume=resume).fit()
        assert rows(tmp_path / name)[: 4 + 1] == rows(tmp_path / "first")


def test_resuming_under_other_settings_is_refused(split, tmp_path):
    make_trainer(split, tmp_path / "first").fit()
    other = make_trainer(split, tmp_path / "second", resume=str(tmp_path / "first"))
    other.run = {"seed": 1}
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        other.fit()
    changed = {"seed": 1, "data": {"augment": {"hflip": 0.5, "erase": 0.0}, "root": None}}
    checkpoint = Checkpoint.open(tmp_path / "first")
    before = replace(checkpoint, run={"seed": 1, "data": {"augment": {"hflip": 0.0, "erase": 0.0}, "size": 64}})
    with pytest.raises(ConfigError, match=r": data\.augment\.hflip was 0\.0 and is now 0\.5, data\.size was 64 and"):
        before.check(changed)
    nowhere = make_trainer(split, tmp_path / "third", resume=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no checkpoint"):
        nowhere.fit()


def test_resuming_without_the_parameters_to_export_is_refused_before_the_first_step(split, tmp_path):
    make_trainer(split, tmp_path / "first", epochs=1).fit()
    (tmp_path / "first" / "checkpoints" / "best.safetensors").unlink()
    other = make_trainer(split, tmp_path / "second", keep=Keep.best, resume=str(tmp_path / "first"))
    with pytest.raises(ConfigError, match=r"best\.safetensors is not there.*or give trainer\.keep=last"):
        other.fit()
    assert not (tmp_path / "second" / "metrics.jsonl").exists()


def test_the_best_parameters_are_those_of_the_best_validation_whatever_was_to_be_kept_meanwhile(split, tmp_path):
    objective = WatchesARow()
    object.__setattr__(objective, "figures", [0.5, 0.6, 0.4])
    settings = {"objective": objective, "keep": Keep.best}
    make_trainer(split, tmp_path, stop_at=4, **settings).fit()
    better = make_trainer(split, tmp_path, resume=str(tmp_path), stop_at=8, **settings | {"keep": Keep.last})
    better.fit()
    rest = make_trainer(split, tmp_path, resume=str(tmp_path), **settings)
    assert rest.fit().best_step == 8
    assert_same_bits(parameters(rest), parameters(better))


@pytest.mark.parametrize("file", ["model", "optimizer", "generators_0"])
def test_a_damaged_checkpoint_is_refused_by_name(split, tmp_path, file):
    make_trainer(split, tmp_path / "first", epochs=1).fit()
    damaged = tmp_path / "first" / "checkpoints" / "step_00000004" / f"{file}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(ConfigError, match=f"{file}.safetensors can't be read"):
        make_trainer(split, tmp_path / "second", resume=str(tmp_path / "first")).fit()


def test_damaged_parameters_to_export_are_refused_before_the_first_step(split, tmp_path):
    make_trainer(split, tmp_path / "first", epochs=1).fit()
    best = tmp_path / "first" / "checkpoints" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"best\.safetensors can't be read"):
        make_trainer(split, tmp_path / "second", resume=str(tmp_path / "first")).fit()
    assert not (tmp_path / "second" / "metrics.jsonl").exists()


def test_an_unfinished_checkpoint_is_cleared_away(split, tmp_path):
    (tmp_path / "checkpoints" / ".step_00000001.part").mkdir(parents=True)
    make_trainer(split, tmp_path, epochs=1).fit()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000004", "best.safetensors"}


@pytest.mark.parametrize("state", ["{}", "[]", "no JSON", '{"run": {}, "progress": {"stage": 3}, "scaler": null}'])
def test_a_damaged_state_is_refused_by_name(split, tmp_path, state):
    make_trainer(split, tmp_path, epochs=1).fit()
    (file,) = (tmp_path / "checkpoints").glob("step_*/state.json")
    file.write_text(state)
    with pytest.raises(ConfigError, match=r"state\.json can't be read"):
        make_trainer(split, tmp_path, epochs=1, resume=str(tmp_path)).fit()


def test_a_checkpoint_of_other_classes_is_refused(split, tmp_path):
    make_trainer(split, tmp_path / "first", epochs=1).fit()
    other = make_trainer(split, tmp_path / "second", resume=str(tmp_path / "first"))
    other.model.reset_classifier(4)
    other.model.head.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"head\.\w+ has shape \[3.*\] there, and \[4.*\] here"):
        other.fit()


@pytest.mark.parametrize("passes", [4, 6])  # of batches of 6 and 5 samples
def test_accumulated_passes_give_the_gradient_of_the_whole_batch(split, passes, tmp_path):
    whole = make_trainer(split, tmp_path / "whole", adapter=LoraAdapter())
    parts = make_trainer(split, tmp_path / "parts", adapter=LoraAdapter(), accumulation=passes)
    whole.fit()
    parts.fit()
    for name, p in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], p, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_the_optimizers_state_goes_where_its_parameter_is():
    gain = torch.nn.Module()
    gain.scale = torch.nn.Parameter(torch.ones(()))  # as the gains of NFNets are
    optimizer = torch.optim.AdamW(gain.parameters())
    gain.scale.sum().backward()
    optimizer.step()
    kept = _optimizer_tensors(gain, optimizer)
    other = torch.nn.Module()
    other.scale = torch.nn.Parameter(torch.ones((), device="meta"))
    fresh = torch.optim.AdamW(other.parameters())
    _load_optimizer_tensors(other, fresh, kept)
    devices = {key: value.device.type for key, value in fresh.state[other.scale].items()}
    assert devices == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta")  # fused kernels count there too


def test_the_gradient_scaler_goes_on_where_it_was(tmp_path):
    model, scales = torch.nn.Linear(2, 2), []
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        accelerator = new_accelerator(Precision.fp32, cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # accelerate has one on a GPU alone
        if scales:
            load_checkpoint(Checkpoint.open(tmp_path / "step_00000003"), model, optimizer, None, accelerator)
        else:
            accelerator.scaler.scale(torch.ones(()))
            accelerator.scaler.update(4.0)
            save_checkpoint(tmp_path, model, optimizer, None, Progress(3), accelerator, {})
        scales.append(accelerator.scaler.state_dict())
    assert scales[0] == scales[1]
    assert scales[1]["scale"] == 4.0


def test_the_hash_of_a_base_is_of_both_ends_of_its_frozen_weights_in_any_precision():
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 3))
    model[0].requires_grad_(False)
    key = frozen_key([model])
    with torch.no_grad():
        model[1].weight.add_(1.0)
        assert frozen_key([model]) == key
        model.bfloat16()
        assert frozen_key([model]) == key
        before = model[0].weight.clone()
        for place in (0, -1):
            model[0].weight.view(-1)[place] += 1.0
            assert frozen_key([model]) != key
            model[0].weight.copy_(before)
        assert frozen_key([model]) == key


def test_what_is_no_finite_number_is_null_in_the_log(tmp_path):
    MetricLog(tmp_path, new_accelerator(Precision.fp32)).write(3, {"loss": 1.5, "grad_norm": math.nan, "lr": math.inf})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 3, "loss": 1.5, "grad_norm": None, "lr": None}


def test_loader_workers_change_nothing(split, tmp_path):
    alone = make_trainer(split, tmp_path / "alone", epochs=1)
    alone.fit()
    helped = make_trainer(split, tmp_path / "helped", epochs=1, workers=2)
    helped.fit()
    assert_same_bits(parameters(helped), parameters(alone))


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_the_first_step_is_adamw_on_the_mean_loss(split, tmp_path, clip_norm):
    """Against a step written out by hand: plain PyTorch, no accelerate, no fused LoRA bookkeeping in between."""
    optim = OptimConfig(lr=1e-2, head_lr=1e-3, weight_decay=0.1, clip_norm=clip_norm, warmup=0.0)
    trainer = make_trainer(split, tmp_path, adapter=LoraAdapter(), optim=optim, epochs=1, batch_size=22, keep=Keep.last)
    model = trainer.model
    before = parameters(trainer)
    images, labels = next(iter(trainer.batches(0)))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    trainer.fit()
    norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    for name, p in parameters(trainer).items():
        g = grads[name] * min(1.0, (clip_norm or math.inf) / norm)
        lr = 1e-3 if name.startswith("head.") else 1e-2
        decay = 0.1 if before[name].dim() == 2 else 0.0
        expected = before[name] * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_gradients_of_two_processes_average_to_that_of_the_batch_they_share(split, tmp_path, rank):
    trainer = make_trainer(split, tmp_path, adapter=LoraAdapter(), epochs=1, keep=Keep.last, stop_at=1)
    trainer.order = Order(22, 12, 0, accumulation=2, rank=rank, world=2)  # batches of 11, of which 6 are the first's
    own = list(train_loader(split, eval_transform(IMAGES), trainer.order, 0, 1, 0))
    trainer.batches = lambda step: own
    losses = sum(F.cross_entropy(trainer.model(images), labels, reduction="sum") for images, labels in own)
    grads = torch.autograd.grad(losses, [p for p in trainer.model.parameters() if p.requires_grad])
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    trainer.fit()
    (row,) = [row for row in rows(tmp_path) if "loss" in row]
    assert row["loss"] == pytest.approx(losses.item() / 11, rel=1e-4)  # its share of the sum over the processes
    assert row["grad_norm"] == pytest.approx(2 * norm / 11, rel=1e-4)


def test_learning_lowers_the_loss_and_the_best_parameters_are_left_in_the_model(split, tmp_path):
    trainer = make_trainer(split, tmp_path, epochs=12)
    progress = trainer.fit()
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    figures = trainer.objective.validate(trainer.model.eval(), trainer.validation, trainer.accelerator)
    assert figures["val_top1"] == progress.best == max(r["val_top1"] for r in rows(tmp_path) if "val_top1" in r)


class AttentionTypes(TorchFunctionMode):
    """Notes what the inputs of torch's own attention are."""

    own = F.scaled_dot_product_attention

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is self.own:
            self.found.append((args[0].dtype, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


def test_short_attention_of_a_step_in_bf16_is_in_float32(split, tmp_path):
    trainer = make_trainer(split, tmp_path, validate=False, precision=Precision.bf16, epochs=1)
    with AttentionTypes() as types:
        trainer.fit()
    assert types.found == [(torch.float32, False)] * (4 * 2)  # steps, blocks
    losses = [row["loss"] for row in rows(tmp_path)]
    make_trainer(split, tmp_path / "fp32", validate=False, epochs=1).fit()
    assert losses == pytest.approx([row["loss"] for row in rows(tmp_path / "fp32")], rel=0.02)


class WatchesTheLoss(Recognition):
    monitor, higher_is_better = "val_watched", False

    def validate(self, model, batches, accelerator):
        figures = super().validate(model, batches, accelerator)
        return figures | {self.monitor: figures["val_loss"]}


def test_of_a_figure_that_is_better_when_less_the_least_is_the_best(split, tmp_path):
    progress = make_trainer(split, tmp_path, objective=WatchesTheLoss(), epochs=4).fit()
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path) if "val_loss" in row}
    assert progress.best == losses[progress.best_step] == min(losses.values()) < max(losses.values())


def test_a_validation_figure_that_is_no_number_ends_the_run_with_advice(split, tmp_path):
    trainer = make_trainer(split, tmp_path)  # which watches the share of right answers: to argmax NaN is class 0
    trainer.validation = [(torch.full((2, 3, 32, 32), torch.nan), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(TrainingError, match=r"val_loss is nan at step 4; lower optim\.lr"):
        trainer.fit()


def test_validation_comes_as_often_as_is_set_and_at_the_end(split, tmp_path):
    make_trainer(split, tmp_path, epochs=3, validate_every=2).fit()
    assert [row["step"] for row in rows(tmp_path) if "val_top1" in row] == [8, 12]


def test_the_rate_of_each_step_is_its_own_of_the_whole_run(split, tmp_path):
    make_trainer(split, tmp_path, optim=OptimConfig(lr=3e-3, warmup=0.25), epochs=3).fit()
    rates = [row["lr"] for row in rows(tmp_path) if "lr" in row]
    assert rates == pytest.approx([3e-3 * rate_factor(step, 12, 0.25) for step in range(12)])


def test_a_run_stops_when_validation_no_longer_improves(split, tmp_path):
    optim = OptimConfig(lr=0.0)
    progress = make_trainer(split, tmp_path, optim=optim, epochs=20, patience=2).fit()
    assert progress.step == 3 * 4  # the first validation is the best, two more are not better


class WatchesARow(Recognition):
    """Its validation figures are set beforehand."""

    figures: tuple[float, ...]

    def validate(self, model, batches, accelerator):
        now, *later = self.figures
        object.__setattr__(self, "figures", later)
        return {self.monitor: now}


def test_only_validations_since_the_best_one_count_against_a_run(split, tmp_path):
    objective = WatchesARow()
    object.__setattr__(objective, "figures", [0.5, 0.4, 0.6, 0.5, 0.6, 0.7])
    progress = make_trainer(split, tmp_path, objective=objective, epochs=20, patience=2).fit()
    assert (progress.step, progress.best, progress.best_step) == (5 * 4, 0.6, 3 * 4)


def test_a_resumed_run_goes_on_counting_the_validations_without_improvement(split, tmp_path):
    settings = {"optim": OptimConfig(lr=0.0), "epochs": 20, "patience": 3, "keep": Keep.last}
    objective = StopsAt()
    object.__setattr__(objective, "calls_left", 13)  # 4 steps an epoch: two validations after the best one
    with pytest.raises(Stopped):
        make_trainer(split, tmp_path / "cut", objective=objective, **settings).fit()
    resumed = make_trainer(split, tmp_path / "resumed", resume=str(tmp_path / "cut"), **settings)
    assert resumed.fit().step == 4 * 4


def test_a_validation_where_a_run_was_to_end_does_not_count_against_it_when_it_goes_on(split, tmp_path):
    objective = WatchesARow()
    object.__setattr__(objective, "figures", [0.5, 0.4, 0.6, 0.7])  # the second one in mid-epoch
    settings = {"objective": objective, "patience": 1}
    assert make_trainer(split, tmp_path, stop_at=6, **settings).fit().step == 6
    assert make_trainer(split, tmp_path, resume=str(tmp_path), **settings).fit().step == 12


def test_a_validation_where_a_run_was_to_end_is_not_its_best_when_it_goes_on(split, tmp_path):
    def trainer(name, figures, **settings):
        objective = WatchesARow()
        object.__setattr__(objective, "figures", figures)
        made = make_trainer(split, tmp_path / name, objective=objective, patience=1, **settings)
        return made, made.fit()

    whole, _ = trainer("whole", [0.5, 0.6, 0.4])
    last, _ = trainer("last", [0.5, 0.6], stop_at=6, keep=Keep.last)
    short, progress = trainer("short", [0.5, 0.9], stop_at=6)  # in mid-epoch
    assert (progress.best, progress.best_step) == (0.9, 6)
    assert_same_bits(parameters(short), parameters(last))
    rest, progress = trainer("short", [0.6, 0.4], resume=str(tmp_path / "short"))
    assert (progress.step, progress.best, progress.best_step) == (12, 0.6, 8)
    assert_same_bits(parameters(rest), parameters(whole))


def test_speed_is_of_the_steps_without_the_writing_of_checkpoints(split, tmp_path, monkeypatch):
    def slowly(*words):
        save_checkpoint(*words)
        time.sleep(0.5)

    monkeypatch.setattr("vislora.trainer.save_checkpoint", slowly)
    make_trainer(split, tmp_path, epochs=2).fit()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(line["images_per_s"] > 22 / 0.5 for line in lines if "images_per_s" in line)


def test_speed_is_of_all_the_time_that_steps_took_also_with_previews_between_them(split, tmp_path):
    class Slow(Recognition):
        def losses(self, model, batch):
            time.sleep(0.2)
            return super().losses(model, batch)

    trainer = make_trainer(split, tmp_path, objective=Slow(), epochs=2, preview_every=3)
    trainer.preview = lambda file: None
    trainer.fit()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(line["images_per_s"] < 6 / 0.2 for line in lines if "images_per_s" in line)


def test_a_preview_is_of_what_would_be_exported_and_training_goes_on_as_if_it_had_not_been_drawn(split, tmp_path):
    settings = {"ema": 0.5, "keep": Keep.last}
    plain = make_trainer(split, tmp_path / "plain", **settings)
    plain.fit()
    watched = make_trainer(split, tmp_path / "watched", preview_every=5, **settings)
    drawn = {}

    def preview(file):
        torch.rand(3)
        assert not any(module.training for module in watched.model.modules())
        drawn[file.name] = parameters(watched)

    watched.preview = preview
    watched.fit()
    assert [*drawn] == [f"step_{step:08d}.png" for step in (5, 10, 12)]
    assert_same_bits(drawn["step_00000012.png"], parameters(watched))
    assert_same_bits(parameters(watched), parameters(plain))
    assert rows(tmp_path / "watched") == rows(tmp_path / "plain")


def test_a_loss_that_is_no_number_ends_the_run_with_advice(split, tmp_path):
    optim = OptimConfig(lr=1e30, clip_norm=None)
    with pytest.raises(TrainingError, match=r"lower optim\.lr"):
        make_trainer(split, tmp_path, optim=optim, epochs=20).fit()


class HasNoGradient(Recognition):
    """Its losses are numbers, whose gradient is none: that of a square root at zero."""

    def losses(self, model, batch):
        return super().losses(model, batch) + (0.0 * model.head.bias).square().sum().sqrt()


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_in_a_checkpoint(split, tmp_path):
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan at step 1; lower optim\.lr"):
        make_trainer(split, tmp_path, objective=HasNoGradient(), epochs=1, batch_size=22).fit()
    assert not (tmp_path / "checkpoints").exists()


def test_decay_is_for_matrices_and_the_head_has_its_own_rate(split, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=3)
    optimizer = make_optimizer(model, ("head.",), OptimConfig(lr=1.0, head_lr=2.0, weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["head.weight"] == (2.0, 0.3)
    assert found["head.bias"] == (2.0, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (1.0, 0.3)
    for name in ("pos_embed", "cls_token", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"):
        assert found[name] == (1.0, 0.0), name


def test_scales_in_the_shape_of_feature_maps_do_not_decay_and_convolutions_of_rank_1_do():
    model = timm.create_model("fastvit_t8", num_classes=3, layer_scale_init_value=0.1)
    adapt(model, LoraAdapter(targets=[Target.conv], rank=1))
    model.requires_grad_(True)
    groups = make_optimizer(model, (), OptimConfig(weight_decay=0.3)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: (tuple(p.shape), decays[id(p)]) for name, p in model.named_parameters()}
    gammas = [value for name, value in found.items() if name.endswith(".gamma")]
    pairs = [value for name, value in found.items() if name.endswith((".lora_A", ".lora_B"))]
    assert gammas
    assert all(shape[1:] == (1, 1) and decay == 0.0 for shape, decay in gammas)
    assert pairs
    assert all(decay == 0.3 for _, decay in pairs)
    assert found["stem.0.conv_kxk.0.conv.weight"][1] == 0.3


def test_the_optimizers_betas_are_those_that_are_set():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), (), OptimConfig(betas=[0.5, 0.7]))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.7)}


def test_lora_plus_gives_both_matrices_pefts_rates():
    peft = pytest.importorskip("peft")
    loraplus = pytest.importorskip("peft.optimizers")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=3)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["qkv", "proj"]))
    groups = loraplus.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16.0).param_groups
    names = {id(p): name for name, p in theirs.named_parameters()}
    their_rates = {
        names[id(p)].removeprefix("base_model.model."): group["lr"] for group in groups for p in group["params"]
    }
    adapt(model, LoraAdapter())
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, ("head.",), OptimConfig(lr=0.5, head_lr=2.0, b_lr_ratio=16.0)).param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.pop("head.weight") == rates.pop("head.bias") == 2.0
    assert set(rates.values()) == {0.5, 8.0}
    for path in ("qkv", "proj"):
        for matrix in ("lora_A", "lora_B"):
            mine = rates[f"blocks.0.attn.{path}.lora.{matrix}"]
            assert mine == their_rates[f"blocks.0.attn.{path}.{matrix}.default.weight"]


def test_frozen_batchnorm_keeps_the_statistics_of_the_base_and_a_trained_one_its_own(split, tmp_path):
    trainer = make_trainer(split, tmp_path, epochs=1, keep=Keep.last)
    trainer.model = timm.create_model("resnet10t", num_classes=3)
    trainer.model.requires_grad_(False)
    for module in (trainer.model.bn1, trainer.model.get_classifier()):
        module.requires_grad_(True)
    before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.fit()
    after = dict(trainer.model.named_buffers())
    assert {n.rpartition(".")[0] for n in after if not torch.equal(after[n], before[n])} == {"bn1"}


def test_batchnorm_keeps_the_statistics_of_the_base_where_its_bias_alone_is_trained(split, tmp_path):
    trainer = make_trainer(split, tmp_path, epochs=1, keep=Keep.last)
    model = trainer.model = timm.create_model("resnet10t", num_classes=3)
    base = copy.deepcopy(model)
    adapters = adapt(model, LoraAdapter(targets=[Target.conv], bias=Bias.all))
    trainer.fit()
    assert not torch.equal(model.bn1.bias, base.bn1.bias)
    opened = Adapters(base)
    opened.load("default", adapters.adapter("default"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(base.eval()(images), model.eval()(images))


def test_the_rate_rises_linearly_then_falls_as_half_a_cosine():
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.0, abs=1e-3)
    assert rate_factor(0, 1, 0.0) == 1.0
