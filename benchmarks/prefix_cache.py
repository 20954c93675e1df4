"""python benchmarks/prefix_cache.py [--model vit_small_patch16_224] [--last 4] [--batch 8] [--rounds 12]

What a training step of the last blocks costs from cached features (trainer.prefix_cache), interleaved in one run with
the same step from pictures, and with a step that adapts every block. Ratios are medians over rounds of (from features /
other, in the same round); reading a batch of features from memory is part of its step.

"limit" is the step of the last blocks alone, written out by hand. Where forward and backward pass of a block cost the
same, 4 blocks of 12 are (4 + 4) / (12 + 4) = 0.50 of their step from pictures; no cache can save more than that.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import date

import timm
import torch
from torch import Tensor, nn

from vislora.lora import Adapters, LoraSettings
from vislora.models.prefix import Prefix
from vislora.precision import cpu_has_bf16
from vislora.targets.timm import find_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--last", type=int, default=4, help="adapted blocks")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(f"{where}; torch {torch.__version__}; {date.today()}; {options.model}, batch {options.batch}")
    print(f"{'':10}{'all blocks':>12}{f'last {options.last}':>12}{'cached':>10}{'x last':>10}{'x all':>8}{'limit':>8}")
    base = timm.create_model(options.model, num_classes=10).to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    for dtype in [None, torch.bfloat16] if device.type == "cuda" or cpu_has_bf16() else [None]:
        _compare(base, images, options.last, dtype, options.rounds)


def _compare(base: nn.Module, images: Tensor, last: int, dtype: torch.dtype | None, rounds: int) -> None:
    every = _adapted(base, None)
    tail = _adapted(base, list(range(-last, 0)))
    cached = _adapted(base, list(range(-last, 0)))
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        prefix = Prefix(cached.eval(), images[:2])
        rows = prefix.features(images).cpu()
    cached.train()
    index = torch.arange(len(images))
    steps: dict[str, Callable[[], Tensor]] = {
        "every": lambda: _loss(every, images, dtype),
        "tail": lambda: _loss(tail, images, dtype),
        "cached": lambda: _loss(cached, rows[index].to(images.device), dtype),
        "limit": lambda: _loss(_Tail(cached, prefix.count), rows[index].to(images.device), dtype),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, loss in steps.items():
            if name == "cached":
                with prefix.skipped(images.shape[1:]):
                    seconds = _step(loss, images)
            else:
                seconds = _step(loss, images)
            if turn >= 2:  # the first rounds warm up
                times[name].append(seconds)
    ratio = {
        (one, other): statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
        for one in ("cached", "limit")
        for other in ("tail", "every")
    }
    print(
        f"{'fp32' if dtype is None else 'bf16':10}"
        f"{1e3 * statistics.median(times['every']):9.1f} ms{1e3 * statistics.median(times['tail']):9.1f} ms"
        f"{1e3 * statistics.median(times['cached']):7.1f} ms{ratio['cached', 'tail']:10.3f}"
        f"{ratio['cached', 'every']:8.3f}{ratio['limit', 'tail']:8.3f}"
    )


class _Tail(nn.Module):
    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, features: Tensor) -> Tensor:
        for block in self.model.blocks[self.start :]:
            features = block(features)
        return self.model.forward_head(self.model.norm(features))


def _adapted(base: nn.Module, blocks: list[int] | None) -> nn.Module:
    model = deepcopy(base)
    settings = LoraSettings(rank=8, alpha=16)
    Adapters(model).add("default", find_targets(model, ["qkv", "o"], blocks), settings, trained=["head"])
    return model.train()


def _loss(model: nn.Module, inputs: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast(inputs.device.type, dtype, enabled=dtype is not None):
        return model(inputs).float().logsumexp(1).mean()


def _step(loss: Callable[[], Tensor], images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    since = time.perf_counter()
    loss().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - since


if __name__ == "__main__":
    main()
