"""python benchmarks/prefix_cache.py [--model vit_small_patch16_224] [--last 4] [--batch 8] [--rounds 12]

What a training step of the last blocks costs from cached features (trainer.prefix_cache), interleaved in one run with
the same step from pictures, and with a step that adapts every block. Ratios are medians over rounds of (from features /
other, in the same round); reading a batch of features from memory is part of its step.

"limit" is the step of the last blocks alone, written out by hand. Where forward and backward pass of a block cost the
same, 4 blocks of 12 are (4 + 4) / (12 + 4) = 0.50 of their step from pictures; no cache can save more than that.
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy

import timm
import torch
from interleaved import in_turns, machine, ratio, timed
from torch import Tensor, nn

from vislora.lora import Adapters, LoraSettings
from vislora.models.prefix import Prefix
from vislora.precision import cpu_has_bf16
from vislora.targets.timm import find_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--last", type=int, default=4, help="adapted blocks")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine()}; {options.model}, batch {options.batch}")
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

    def step(model: nn.Module, inputs: Callable[[], Tensor]) -> float:
        return timed(lambda: _loss(model, inputs(), dtype).backward())

    def read() -> Tensor:
        return rows[index].to(images.device)

    def from_features() -> float:
        with prefix.skipped(images.shape[1:]):
            return step(cached, read)

    variants = {
        "every": lambda: step(every, lambda: images),
        "tail": lambda: step(tail, lambda: images),
        "cached": from_features,
        "limit": lambda: step(_Tail(cached, prefix.count), read),
    }
    times = in_turns(variants, rounds)
    print(
        f"{'fp32' if dtype is None else 'bf16':10}"
        f"{1e3 * statistics.median(times['every']):9.1f} ms{1e3 * statistics.median(times['tail']):9.1f} ms"
        f"{1e3 * statistics.median(times['cached']):7.1f} ms{ratio(times['cached'], times['tail']):10.3f}"
        f"{ratio(times['cached'], times['every']):8.3f}{ratio(times['limit'], times['tail']):8.3f}"
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


if __name__ == "__main__":
    main()
