"""python benchmarks/step_time.py [--models vit_tiny_patch16_224 vit_small_patch16_224] [--batch 8] [--rounds 15]

What one training step costs: the frozen limit, vislora, PEFT and full fine-tuning, interleaved in one run.

The frozen limit is the least any adapter can cost: the model's forward pass, and the backward pass of activations from
the loss to the first block, with the head alone trained. Ratios are medians over rounds of (variant / limit in the same
round), so that a machine whose speed drifts does them no harm. "saved" is what autograd keeps for backward, parameters
aside.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import date

import peft
import timm
import torch
from torch import nn

from vislora.lora import Adapters, LoraSettings
from vislora.precision import cpu_has_bf16
from vislora.targets.timm import find_targets

RANK, ALPHA = 8, 16


def limit(model: nn.Module) -> nn.Module:
    _head_only(model)
    # gradients flow down to the first block, as they must for adapters in it
    model.patch_embed.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    return model


def vislora(dropout: float, dora: bool = False) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        settings = LoraSettings(RANK, ALPHA, dropout, dora=dora)
        Adapters(model).add("default", find_targets(model, ["qkv", "o"]), settings, trained=["head"])
        return model

    return build


def with_peft(dropout: float, dora: bool = False) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            use_dora=dora,
            target_modules=r".*attn\.(qkv|proj)",
            modules_to_save=["head"],
        )
        return peft.get_peft_model(model, config)

    return build


def full(model: nn.Module) -> nn.Module:
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen limit": limit,
    "vislora": vislora(0.0),
    "vislora, dropout 0.1": vislora(0.1),
    "vislora, DoRA": vislora(0.0, dora=True),
    "vislora, DoRA, dropout 0.1": vislora(0.1, dora=True),
    "PEFT": with_peft(0.0),
    "PEFT, dropout 0.1": with_peft(0.1),
    "PEFT, DoRA": with_peft(0.0, dora=True),
    "PEFT, DoRA, dropout 0.1": with_peft(0.1, dora=True),
    "full fine-tuning": full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="some of the rows")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [None, torch.bfloat16] if device.type == "cuda" or cpu_has_bf16() else [None]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, peft {peft.__version__}; {date.today()}; batch {options.batch}")
    print(f"{'':28}{'precision':>10}{'ms':>9}{'x limit':>9}{'saved MB':>10}{'x limit':>9}")
    for name in options.models:
        base = timm.create_model(name, num_classes=10)
        for dtype in dtypes:
            models = {
                title: build(deepcopy(base)).to(device).train()
                for title, build in VARIANTS.items()
                if title in {"frozen limit", *options.only}
            }
            compare(name, models, dtype, torch.randn(options.batch, 3, 224, 224, device=device), options.rounds)


def compare(name: str, models: dict[str, nn.Module], dtype: torch.dtype | None, images: torch.Tensor, rounds: int):
    saved = {title: _saved_bytes(model, images, dtype) for title, model in models.items()}
    times: dict[str, list[float]] = {title: [] for title in models}
    for turn in range(rounds + 2):
        for title, model in models.items():
            seconds = _step(model, images, dtype)
            if turn >= 2:  # the first rounds warm up
                times[title].append(seconds)
    base = times["frozen limit"]
    print(name)
    for title in models:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times[title], base, strict=True))
        print(
            f"  {title:26}{'fp32' if dtype is None else 'bf16':>10}{1e3 * statistics.median(times[title]):9.1f}"
            f"{ratio:9.3f}{saved[title] / 1e6:10.1f}{saved[title] / saved['frozen limit']:9.3f}"
        )


def _step(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> float:
    _synchronize(images)
    since = time.perf_counter()
    _loss(model, images, dtype).backward()
    _synchronize(images)
    seconds = time.perf_counter() - since
    model.zero_grad(set_to_none=True)
    return seconds


def _saved_bytes(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of the distinct storages that the graph keeps for backward and that aren't parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    loss = _loss(model, images, dtype)
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # built-in nodes show what they saved as _saved_*, autograd.Functions as saved_tensors
        found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in [*found, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


def _loss(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    return logits.float().logsumexp(1).mean()


def _head_only(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def _synchronize(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
