"""python benchmarks/many_adapters.py [--model vit_small_patch16_224] [--adapters 8] [--batch 8] [--rounds 10]

What it costs that each sample of a batch has its own adapter, interleaved in one run: a training step and a forward
pass with one adapter and with many of them per sample, and PEFT's forward pass with `adapter_names` (which it refuses
in training). Every adapter acts on qkv and proj. Ratios are medians over rounds of (time / vislora with one adapter in
the same round).
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import peft
import timm
import torch
from interleaved import in_turns, machine, ratio, timed
from torch import Tensor, nn

from vislora.lora import Adapters, LoraSettings
from vislora.precision import cpu_has_bf16
from vislora.targets.timm import find_targets

RANK, ALPHA = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine()}; peft {peft.__version__}")
    print(f"{options.model}, batch {options.batch}, {options.adapters} adapters")
    base = timm.create_model(options.model, num_classes=10).to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    names = [f"task{i}" for i in range(options.adapters)]
    samples = [names[i % len(names)] for i in range(options.batch)]
    adapters, theirs = _mine(base, names), _peft(base, names)
    for dtype in [None, torch.bfloat16] if device.type == "cuda" or cpu_has_bf16() else [None]:
        _compare(adapters, theirs, samples, images, dtype, options.rounds)


def _compare(
    adapters: Adapters, theirs: nn.Module, samples: list[str], images: Tensor, dtype: torch.dtype | None, rounds: int
) -> None:
    def one_step() -> None:
        _loss(adapters.model(images)).backward()

    def mixed_step() -> None:
        with adapters.per_sample(samples):
            _loss(adapters.model(images)).backward()

    @torch.no_grad()
    def one_pass() -> None:
        adapters.model(images)

    @torch.no_grad()
    def mixed_pass() -> None:
        with adapters.per_sample(samples):
            adapters.model(images)

    @torch.no_grad()
    def peft_one() -> None:
        theirs(images)

    @torch.no_grad()
    def peft_mixed() -> None:
        theirs(images, adapter_names=samples)

    def run(what: Callable[[], None]) -> float:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return timed(what)

    runs = {
        "step, one adapter": one_step,
        "step, per sample": mixed_step,
        "forward, one adapter": one_pass,
        "forward, per sample": mixed_pass,
        "PEFT forward, one adapter": peft_one,
        "PEFT forward, per sample": peft_mixed,
    }
    times = in_turns({title: partial(run, what) for title, what in runs.items()}, rounds)
    for title, mine in times.items():
        base = times["step, one adapter" if title.startswith("step") else "forward, one adapter"]
        median = f"{1e3 * statistics.median(mine):9.1f} ms{ratio(mine, base):9.3f}"
        print(f"  {title:28}{'fp32' if dtype is None else 'bf16':>6}{median}")


def _mine(base: nn.Module, names: list[str]) -> Adapters:
    adapters = Adapters(deepcopy(base))
    targets = find_targets(adapters.model, ["qkv", "o"])
    for name in names:
        adapters.add(name, targets, LoraSettings(RANK, ALPHA))
    return adapters


def _peft(base: nn.Module, names: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r".*attn\.(qkv|proj)")
    model = peft.get_peft_model(deepcopy(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def _loss(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(1).mean()


if __name__ == "__main__":
    main()
