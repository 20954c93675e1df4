"""python benchmarks/quality.py [--methods probe,lora,peft,full] [--seeds 0,1,2] [OVERRIDES of vislora.train …]

What tuning reaches on a test split: a linear probe, vislora's LoRA, PEFT's LoRA on the same protocol, and full
fine-tuning, over several seeds, as one table. By default the drawn birds of recipe=vit_birds; with photos of your own:

    python benchmarks/quality.py data=imagefolder data.root=FOLDER model=timm model.name=vit_small_patch14_dinov2 …

A value for one method only: lora:optim.lr=2e-3 (which PEFT shares), probe:optim.lr=3e-3, full:optim.lr=1e-4.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import nn

from vislora.compose import configure
from vislora.config import LoraAdapter, TrainConfig
from vislora.data.load import load_splits
from vislora.data.order import Order, eval_loader, train_loader
from vislora.data.transforms import eval_transform, train_transform
from vislora.models.vit import build_vit, preprocessing
from vislora.precision import autocast_dtype, resolve_precision
from vislora.targets.timm import find_targets
from vislora.train import train
from vislora.trainer import make_optimizer, rate_factor

ADAPTERS = {"probe": "probe", "lora": "lora", "peft": "lora", "full": "full"}
TITLES = {"probe": "linear probe", "lora": "vislora LoRA", "peft": "PEFT LoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Run:
    correct: int
    images: int
    seconds: float
    trainable: int
    parameters: int
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["probe", "lora", "full"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="as for vislora.train; METHOD:KEY=VALUE for one method only")
    options = parser.parse_args()
    overrides = options.overrides
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {date.today()}; seeds {options.seeds}")
    print(
        f"{'':18}{'top-1':>7}  {'95% interval':>14}{'by seed':>22}{'trained':>10}{'share':>8}{'MB':>7}{'s':>7}",
        flush=True,
    )
    for method in options.methods:
        runs = [_run(method, overrides, seed) for seed in options.seeds]
        rates = [run.correct / run.images for run in runs]
        mean, images = statistics.mean(rates), runs[0].images
        low, high = wilson(mean * images, images)
        print(
            f"{TITLES[method]:18}{mean:7.1%}  {f'{low:.1%}-{high:.1%}':>14}"
            f"{' '.join(f'{rate:.1%}' for rate in rates):>22}{runs[0].trainable:10,}"
            f"{runs[0].trainable / runs[0].parameters:8.2%}{runs[0].megabytes:7.2f}"
            f"{statistics.median(run.seconds for run in runs):7.0f}",
            flush=True,
        )


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share. Seeds share one test set, so its size is the number of trials."""
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


def _run(method: str, overrides: list[str], seed: int) -> Run:
    own = [o.partition(":")[2] for o in overrides if o.startswith(f"{ADAPTERS[method]}:")]
    shared = [o for o in overrides if o.partition(":")[0] not in TITLES]
    recipe = [] if any(o.startswith(("recipe=", "data=")) for o in shared) else ["recipe=vit_birds"]
    chosen = [f"adapter={method}"] if method in ("probe", "full") else []  # a recipe chooses its own LoRA
    config = configure("train", [*recipe, *chosen, *shared, *own, f"seed={seed}", "trainer.progress=false"])
    with tempfile.TemporaryDirectory() as out:
        if method == "peft":
            return _run_peft(config, Path(out))
        since = time.perf_counter()
        result = train(config, Path(out))
        seconds = time.perf_counter() - since
        size = sum(file.stat().st_size for file in result.artifact.glob("*.safetensors")) / 1e6
        correct = round(result.test.top1 * result.test.count)
        return Run(correct, result.test.count, seconds, result.trainable, result.parameters, size)


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
    loader = train_loader(splits.train, train_transform(images, config.data.augment), order, 0, steps, 0)
    dtype = autocast_dtype(resolve_precision(config.trainer.precision, torch.device("cpu")))
    optimizer = make_optimizer(model, head, config.optim)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, (pictures, labels) in enumerate(loader):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(step, steps, config.optim.warmup)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(pictures)
        F.cross_entropy(logits.float(), labels, label_smoothing=config.objective.label_smoothing).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    correct = 0
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for pictures, labels, _ in eval_loader(splits.test, eval_transform(images), 64, 0):
            correct += (model(pictures).argmax(1) == labels).sum().item()
    model.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Run(correct, len(splits.test), time.perf_counter() - since, trainable, total, size)


if __name__ == "__main__":
    main()
