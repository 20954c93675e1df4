"""python benchmarks/cpu_attention.py [--rounds 12]

What a training step costs on a CPU in fp32, in bf16 as autocast has it, and in bf16 with short attention in float32, as
the trainer has it; interleaved in one run, rank 8 on all attention. Ratios are medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from interleaved import machine
from torch import Tensor

from vislora.config import PipelineConfig
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.models.diffusion import load_pipeline
from vislora.precision import Float32Attention
from vislora.targets import diffusers
from vislora.targets import timm as timm_targets

SETTINGS = LoraSettings(rank=8, alpha=8)
VARIANTS: dict[str, Callable[[], tuple[AbstractContextManager, bool]]] = {
    "fp32": lambda: (nullcontext(), False),
    "bf16": lambda: (nullcontext(), True),
    "as trained": lambda: (Float32Attention(), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    print(machine())
    print(f"{'':40}{''.join(f'{title:>14}' for title in VARIANTS)}{'/ bf16':>9}{'/ fp32':>9}")
    cases = {
        "ViT-Ti, 96 px, batch 20": vit("vit_tiny_patch16_224", 96, 20),
        "ViT-Ti, 224 px, batch 8": vit("vit_tiny_patch16_224", 224, 8),
        "ViT-S, 224 px, batch 8": vit("vit_small_patch16_224", 224, 8),
        "embedded UNet, 64 px, batch 16": unet(16),
    }
    for name, forward in cases.items():
        times: dict[str, list[float]] = {title: [] for title in VARIANTS}
        for turn in range(options.rounds + 2):
            for title, variant in VARIANTS.items():
                seconds = step(forward, *variant())
                if turn >= 2:  # the first warm up
                    times[title].append(seconds)
        cells = "".join(f"{1e3 * statistics.median(values):11.0f} ms" for values in times.values())
        ratios = [ratio(times["as trained"], times[other]) for other in ("bf16", "fp32")]
        print(f"{name:40}{cells}{''.join(f'{value:9.2f}' for value in ratios)}", flush=True)


def vit(name: str, side: int, batch: int) -> Callable[[], Tensor]:
    model = timm.create_model(name, img_size=side).train()
    Adapters(model).add("default", timm_targets.find_targets(model, ["qkv", "o"]), SETTINGS, trained=["head"])
    images = torch.randn(batch, 3, side, side)
    return lambda: model(images)


def unet(batch: int) -> Callable[[], Tensor]:
    model = load_pipeline(PipelineConfig("embedded")).unet.requires_grad_(False).train()
    found = diffusers.find_targets(model, ["q", "k", "v", "o"])
    Adapters(model).add("default", [TargetLayer(target.name) for target in found], SETTINGS)
    latents, text, timesteps = torch.randn(batch, 8, 16, 16), torch.randn(batch, 24, 128), torch.randint(1000, (batch,))
    return lambda: model(latents, timesteps, text).sample


def step(forward: Callable[[], Tensor], attention: AbstractContextManager, in_bf16: bool) -> float:
    since = time.perf_counter()
    with attention:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            y = forward()
        y.float().square().mean().backward()
    return time.perf_counter() - since


def ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


if __name__ == "__main__":
    main()
