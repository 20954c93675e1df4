"""python benchmarks/cpu_attention.py [--rounds 12]

What a training step costs on a CPU in fp32, in bf16 as autocast has it, and in bf16 with short attention in float32, as
the trainer has it; rank 8 on all attention. Then forward and backward pass of attention alone. All take turns in one
run; ratios are medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from interleaved import in_turns, machine, ratio
from torch import Tensor

from vislora.config.model import PipelineConfig
from vislora.config.training import Precision
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.models.diffusion import load_pipeline
from vislora.precision import new_accelerator, training_attention
from vislora.targets import diffusers
from vislora.targets import timm as vits

SETTINGS = LoraSettings(rank=8, alpha=8)
VARIANTS = ("fp32", "bf16", "bf16, attention fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    print(machine())
    print(f"{'':34}{''.join(f'{title:>22}' for title in VARIANTS)}{'/ bf16':>9}{'/ fp32':>9}")
    compare("ViT-Ti, 96 px, batch 20", vit("vit_tiny_patch16_224", 96, 20), options.rounds)
    compare("ViT-Ti, 224 px, batch 8", vit("vit_tiny_patch16_224", 224, 8), options.rounds)
    compare("ViT-S, 224 px, batch 8", vit("vit_small_patch16_224", 224, 8), options.rounds)
    compare("embedded UNet, 64 px, batch 16", unet(16), options.rounds)
    for batch, heads, queries, keys, width in (
        (16, 4, 64, 64, 32),
        (16, 2, 256, 24, 32),
        (16, 2, 256, 256, 32),
        (8, 6, 197, 197, 64),
        (4, 12, 577, 577, 64),
        (1, 8, 1024, 1024, 40),
    ):
        name = f"attention, {batch} x {heads}, {queries} to {keys}, {width}"
        compare(name, attention(batch, heads, queries, keys, width), options.rounds)


def compare(name: str, forward: Callable[[], Tensor], rounds: int) -> None:
    """Print a line; `forward` gives a tensor to start the backward pass from."""
    times = in_turns({title: partial(step, forward, title) for title in VARIANTS}, rounds)
    cells = "".join(f"{1e3 * statistics.median(values):19.1f} ms" for values in times.values())
    fp32, bf16, ours = times.values()
    print(f"{name:34}{cells}{ratio(ours, bf16):9.2f}{ratio(ours, fp32):9.2f}", flush=True)


def step(forward: Callable[[], Tensor], variant: str) -> float:
    accelerator = new_accelerator(Precision.bf16 if variant == VARIANTS[2] else Precision.fp32, cpu=True)
    since = time.perf_counter()
    with training_attention(accelerator):
        with torch.autocast("cpu", torch.bfloat16, enabled=variant != "fp32"):
            y = forward()
        y.float().square().mean().backward()
    return time.perf_counter() - since


def vit(name: str, side: int, batch: int) -> Callable[[], Tensor]:
    model = timm.create_model(name, img_size=side).train()
    Adapters(model).add("default", vits.find_targets(model, ["qkv", "o"]), SETTINGS, trained=["head"])
    images = torch.randn(batch, 3, side, side)

    def forward() -> Tensor:
        model.zero_grad(set_to_none=True)
        return model(images)

    return forward


def unet(batch: int) -> Callable[[], Tensor]:
    model = load_pipeline(PipelineConfig("embedded")).unet.requires_grad_(False).train()
    found = diffusers.find_targets(model, ["q", "k", "v", "o"])
    Adapters(model).add("default", [TargetLayer(target.name) for target in found], SETTINGS)
    latents, text, timesteps = torch.randn(batch, 8, 16, 16), torch.randn(batch, 24, 128), torch.randint(1000, (batch,))

    def forward() -> Tensor:
        model.zero_grad(set_to_none=True)
        return model(latents, timesteps, text).sample

    return forward


def attention(batch: int, heads: int, queries: int, keys: int, width: int) -> Callable[[], Tensor]:
    inputs = [torch.randn(batch, heads, n, width) for n in (queries, keys, keys)]

    def forward() -> Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        return F.scaled_dot_product_attention(*(x.to(dtype, copy=True).requires_grad_() for x in inputs))

    return forward


if __name__ == "__main__":
    main()
