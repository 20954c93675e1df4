"""python benchmarks/apply.py [--rounds 10]

What it takes to put a rank-8 adapter into a pipeline of Stable Diffusion 1.5's size, whose weights are left unset:
vislora beside diffusers with PEFT, from tensors in memory and from the file.
"""

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from interleaved import machine
from safetensors.torch import load_file
from torch import nn

from vislora.formats.detect import read_adapter, write_adapter
from vislora.lora import Adapter, LowRankWeights
from vislora.pipeline import apply, unapply
from vislora.targets.diffusers import find_targets

RANK = 8
# what is adapted: words for the UNet, words for the text encoder
ADAPTERS = {
    "attention of the UNet": (["q", "k", "v", "o"], []),
    "all that kohya's trainer adapts": (["q", "k", "v", "o", "mlp", "proj"], ["q", "k", "v", "o", "mlp"]),
}


@dataclass
class Vislora:
    pipe: Any
    file: Path

    def __post_init__(self) -> None:
        self.adapter = read_adapter(self.file)

    def apply_tensors(self) -> None:
        self.applied = apply(self.pipe, self.adapter, scale=0.8)

    def apply_file(self) -> None:
        self.applied = apply(self.pipe, self.file, scale=0.8)

    def change_scale(self) -> None:
        self.applied.scale = 0.5

    def take_out(self) -> None:
        unapply(self.pipe)


@dataclass
class Diffusers:
    pipe: Any
    file: Path

    def __post_init__(self) -> None:
        self.tensors = load_file(self.file)

    def apply_tensors(self) -> None:
        self.pipe.load_lora_weights(self.tensors, adapter_name="it")

    def apply_file(self) -> None:
        self.pipe.load_lora_weights(str(self.file), adapter_name="it")

    def change_scale(self) -> None:
        self.pipe.set_adapters("it", 0.5)

    def take_out(self) -> None:
        self.pipe.unload_lora_weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    pipe = stable_diffusion()
    print(f"{machine()}; diffusers {diffusers.__version__}, peft {peft.__version__}; medians in ms")
    print(f"{'':36}{'layers':>8}{'vislora':>10}{'diffusers':>11}{'ratio':>8}")
    for name, (unet, text) in ADAPTERS.items():
        adapter = random_adapter(pipe, unet, text)
        with tempfile.TemporaryDirectory() as folder:
            file = write_adapter(adapter, "diffusers", Path(folder))
            ours, theirs = (measure(tool(pipe, file), options.rounds) for tool in (Vislora, Diffusers))
        print(name)
        for title, mine in ours.items():
            ratio = theirs[title] / mine
            print(f"  {title:34}{len(adapter.layers):8}{mine:10.1f}{theirs[title]:11.1f}{ratio:7.0f}x")


def measure(tool: Vislora | Diffusers, rounds: int) -> dict[str, float]:
    """Medians in ms."""
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for start in ("apply_tensors", "apply_file"):
            for action in (start, "change_scale", "take_out"):
                since = time.perf_counter()
                getattr(tool, action)()
                seconds = time.perf_counter() - since
                if turn > 0:  # the first warms up
                    times.setdefault(action.replace("_", " "), []).append(1e3 * seconds)
    return {title: statistics.median(values) for title, values in times.items()}


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    """The UNet and the text encoder, in half precision; no other component is needed."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    models: dict[str, nn.Module] = {"unet": unet, "text_encoder": text}
    models = {name: model.to(torch.float16).to_empty(device="cpu") for name, model in models.items()}
    absent = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        **models, **absent, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    )


def random_adapter(pipe: Any, unet: list[str], text: list[str]) -> Adapter:
    layers = {}
    for component, words in (("unet", unet), ("text_encoder", text)):
        model = getattr(pipe, component)
        for target in find_targets(model, words) if words else ():
            weight = model.get_submodule(target.name).weight
            out, inner, *kernel = weight.shape
            a, b = torch.randn(RANK, inner, *kernel), torch.randn(out, RANK, *[1] * len(kernel))
            layers[f"{component}.{target.name}"] = LowRankWeights(a, b, RANK, float(RANK), out)
    return Adapter(layers)


if __name__ == "__main__":
    main()
