"""python benchmarks/quality.py [--methods probe,lora,peft,full] [--seeds 0,1,2] [--out FOLDER] [OVERRIDES …]

What tuning reaches on a test split: a linear probe, vislora's LoRA, PEFT's LoRA on the same protocol, and full
fine-tuning, over several seeds, as one table; the runs and a report of them all are left in a folder. Overrides are
those of vislora.train.

By default it trains on the drawn birds of recipe=vit_birds; on photos of your own:

    python benchmarks/quality.py data=imagefolder data.root=FOLDER model=timm model.name=vit_small_patch14_dinov2 …

A value for one method only: lora:optim.lr=2e-3 (which PEFT shares), probe:optim.lr=3e-3, full:optim.lr=1e-4.
"""

import argparse
import shutil
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

from vislora.compose import configure
from vislora.config.adapter import LoraAdapter
from vislora.config.commands import EvaluateConfig
from vislora.config.data import data_to_dict
from vislora.config.training import TrainConfig
from vislora.data.load import load_splits
from vislora.data.order import Order, eval_loader, train_loader
from vislora.data.transforms import eval_transform, train_transform
from vislora.metrics.intervals import mean_interval
from vislora.metrics.recognition import Evaluation, Predictions, evaluate_predictions
from vislora.models.patches import ShownPatches
from vislora.models.vit import build_vit, preprocessing
from vislora.objectives.recognition import Recognition
from vislora.precision import autocast_dtype, resolve_precision
from vislora.report.scores import Scored, write_scores
from vislora.targets.timm import find_targets
from vislora.train import train
from vislora.trainer import make_optimizer, rate_factor

ADAPTERS = {"probe": "probe", "lora": "lora", "peft": "lora", "full": "full"}
TITLES = {"probe": "linear probe", "lora": "vislora LoRA", "peft": "PEFT LoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Run:
    test: Evaluation
    data: str
    seconds: float
    trainable: int
    parameters: int
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["probe", "lora", "full"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(f"runs/quality/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    parser.add_argument("overrides", nargs="*", help="as for vislora.train; METHOD:KEY=VALUE for one method only")
    options = parser.parse_intermixed_args()
    now = f"{datetime.now():%Y-%m-%d}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {now}; seeds {options.seeds}")
    first = options.methods[0]
    compared = f"less {first} (95%)"
    print(
        f"{'':18}{'top-1':>7}  {'95% interval':>14}  {compared:>24}{'by seed':>22}{'trained':>12}{'share':>8}"
        f"{'MB':>7}{'s':>7}",
        flush=True,
    )
    runs: dict[str, list[Run]] = {}
    for method in options.methods:
        runs[method] = [
            _run(method, options.overrides, seed, options.out / f"{method}_{seed}") for seed in options.seeds
        ]
        print(_line(method, runs[method], runs[first]), flush=True)
    rows = [
        Scored(f"{TITLES[method]}, seed {seed}", run.data, {}, run.test, {})
        for method, made in runs.items()
        for seed, run in zip(options.seeds, made, strict=True)
    ]
    write_scores(rows, [], EvaluateConfig(adapter=[str(options.out)]), options.out)
    print(f"the report: {options.out / 'report.html'}")


def _line(method: str, runs: list[Run], reference: list[Run]) -> str:
    """A row of the table. Seeds share one test set: the images are resampled, each with its share of right answers."""
    right, theirs = _right(runs), _right(reference)
    low, high = mean_interval(right)
    less_low, less_high = mean_interval(right - theirs)
    gain = f"{(right - theirs).mean() * 100:+.1f} ({less_low * 100:+.1f} to {less_high * 100:+.1f})"
    return (
        f"{TITLES[method]:18}{right.mean():7.1%}  {f'{low:.1%}-{high:.1%}':>14}  "
        f"{'' if runs is reference else gain:>24}{' '.join(f'{run.test.top1:.1%}' for run in runs):>22}"
        f"{runs[0].trainable:12,}{runs[0].trainable / runs[0].parameters:8.2%}{runs[0].megabytes:7.2f}"
        f"{statistics.median(run.seconds for run in runs):7.0f}"
    )


def _right(runs: list[Run]) -> np.ndarray:
    """The share of seeds that classify each image rightly, [N]."""
    answers = [run.test.predictions for run in runs]
    return np.mean([(p.logits.argmax(1) == p.labels).numpy() for p in answers], axis=0)


def _run(method: str, overrides: list[str], seed: int, out: Path) -> Run:
    own = [o.partition(":")[2] for o in overrides if o.startswith(f"{ADAPTERS[method]}:")]
    shared = [o for o in overrides if o.partition(":")[0] not in TITLES]
    recipe = [] if any(o.startswith(("recipe=", "data=")) for o in shared) else ["recipe=vit_birds"]
    chosen = [f"adapter={method}"] if method in ("probe", "full") else []  # a recipe chooses its own LoRA
    config = configure("train", [*recipe, *chosen, *shared, *own, f"seed={seed}", "trainer.progress=false"])
    if method == "peft":
        return _run_peft(config, out)
    since = time.perf_counter()
    result = train(config, out)
    seconds = time.perf_counter() - since
    shutil.rmtree(out / "checkpoints")
    data = data_to_dict(config.data)["option"]
    return Run(result.test, data, seconds, result.trainable, result.parameters, _megabytes(result.artifact))


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def _run_peft(config: TrainConfig, out: Path) -> Run:
    """The same model, order, augmentation, optimizer and schedule around PEFT's LoRA, in a loop as its users write
    it."""
    since = time.perf_counter()
    adapter = config.adapter
    assert isinstance(adapter, LoraAdapter)
    splits = load_splits(config.data, config.seed)
    torch.manual_seed(config.seed)
    base = build_vit(config.model, len(splits.classes))
    targets = [t.name for t in find_targets(base, [t.value for t in adapter.targets], adapter.blocks)]
    lora = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(base, lora)
    head = ("base_model.model.head.",)
    images = preprocessing(base, config.data.crop_pct)
    order = Order(len(splits.train), config.trainer.batch_size, config.seed)
    steps = config.trainer.epochs * order.steps_per_epoch
    patches = ShownPatches(base, dropped) if (dropped := config.data.augment.patch_drop) else None
    objective = Recognition(config.objective.label_smoothing, patches)
    shown = None if patches is None else (patches.kept, patches.total)
    loader = train_loader(splits.train, train_transform(images, config.data.augment), order, 0, steps, 0, shown)
    dtype = autocast_dtype(resolve_precision(config.trainer.precision, torch.device("cpu")))
    optimizer = make_optimizer(model, head, config.optim)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, batch in enumerate(loader):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(step, steps, config.optim.warmup)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = objective.losses(model, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    logits = []
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for pictures, _, _ in eval_loader(splits.test, eval_transform(images), 64, 0):
            logits.append(model(pictures).float())
    model.save_pretrained(out)
    labels = torch.tensor(splits.test.labels)
    test = evaluate_predictions(Predictions(splits.classes, torch.cat(logits), labels, list(splits.test.names)))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    seconds = time.perf_counter() - since
    return Run(test, data_to_dict(config.data)["option"], seconds, trainable, total, _megabytes(out))


if __name__ == "__main__":
    main()
