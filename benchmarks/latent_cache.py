"""python benchmarks/latent_cache.py [--cases embedded embedded-photos …] [--rounds 6] [--precision fp32 bf16]

What an epoch of diffusion training costs with latents and text embeddings from the cache (data.cache=true), interleaved
in one run with one that encodes pictures and captions in every step. The embedded pipeline, and one of Stable Diffusion
1.5's shape with random weights; rank 8 on all attention. As in the trainer, freed memory is kept, the denoiser runs
under autocast with its frozen weights cast once, and the encoders in the precision they are loaded in, on a CPU
float32; on one, the half-precision step is timed only where it is native. An epoch is as many steps as there are
batches of pictures, so ratios of steps are ratios of epochs. Pictures are decoded already, except in the "photos"
cases, where they are JPEG files of a phone's 12 megapixels, as people have them: without a cache they are decoded and
reduced in every epoch too.
"Of anew": the cached step, as a share of one in which autocast casts all weights each time.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from interleaved import in_turns, machine, ratio
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vislora.config.model import PipelineConfig
from vislora.config.training import Precision
from vislora.data.captions import Captioned
from vislora.data.encoded import Gallery, LatentSet, PixelSet, encode
from vislora.data.order import SampleKey
from vislora.data.splits import Files
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.models.denoiser import Denoiser
from vislora.models.diffusion import EMBEDDED, PipelineEncoder, load_pipeline
from vislora.objectives.diffusion import Diffusion
from vislora.objectives.schedules import schedule
from vislora.precision import (
    CastOnce,
    autocast_dtype,
    cpu_has_bf16,
    freed_memory_kept,
    new_accelerator,
    training_attention,
)
from vislora.targets.diffusers import find_targets


@dataclass(frozen=True)
class Case:
    """A pipeline, the side of its pictures in pixels, and how many make a batch."""

    pipeline: str
    side: int
    batch: int
    checkpointing: bool = False
    photos: bool = False


CASES = {
    "embedded": Case("embedded", 64, 16),
    "embedded-photos": Case("embedded", 64, 16, photos=True),
    "sd15-256": Case("sd15", 256, 1),
    "sd15-512": Case("sd15", 512, 1),
    "sd15-512-photos": Case("sd15", 512, 1, photos=True),
    "sd15-512-checkpointed": Case("sd15", 512, 1, checkpointing=True),
}
DEFAULT = ["embedded", "embedded-photos", "sd15-256", "sd15-512"]
PHOTO = (4000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--cases", nargs="+", default=DEFAULT, choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = device.type == "cuda" or cpu_has_bf16()
    print(machine())
    print(f"{'':24}{'denoiser':>10}{'without':>12}{'cached':>12}{'ratio':>8}{'encoding':>12}{'of anew':>9}")
    with freed_memory_kept(device), tempfile.TemporaryDirectory() as folder:
        os.environ["VISLORA_CACHE"] = folder
        for name in options.cases:
            steps = Steps(CASES[name], device)
            for precision in options.precision:
                if precision == "fp32" or native:
                    _compare(name, steps, precision, options.rounds)


class Steps:
    """Training steps of one pipeline, from pictures and from the cache."""

    def __init__(self, case: Case, device: torch.device) -> None:
        pipe = load_pipeline(PipelineConfig("embedded")) if case.pipeline == "embedded" else stable_diffusion()
        self.model = Denoiser(pipe, text=False).to(device).requires_grad_(False).train()
        if case.checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        targets = [TargetLayer(f"unet.{target.name}") for target in find_targets(pipe.unet, ["q", "k", "v", "o"])]
        Adapters(self.model).add("default", targets, LoraSettings(rank=8, alpha=8))
        encoder = PipelineEncoder(pipe, device)
        captions = [f"a picture of bird number {i}" for i in range(case.batch)]
        pictures = Captioned(captions, captions, _photos(case.batch) if case.photos else _squares(case))
        sizes = [(case.side, case.side)] * case.batch
        gallery = Gallery(pictures, sizes, [1.0] * case.batch, range(case.batch))
        self.device = device
        self.keys = [SampleKey(0, 0, i) for i in range(case.batch)]
        self.pixels = PixelSet(gallery, encoder.tokens(captions))
        self.latents = LatentSet(gallery, None, encode(gallery, encoder, with_text=True))
        no_text = encoder.text(encoder.tokens([""]))
        self.encoding = Diffusion(schedule(pipe.scheduler, device), no_text, encoder, encode_text=True)
        self.reading = Diffusion(schedule(pipe.scheduler, device), no_text)

    def without(self, precision: str) -> Tensor:
        """The loss of a batch of pictures, [B]."""
        return self._losses(self.encoding, self.pixels, precision)

    def cached(self, precision: str) -> Tensor:
        """The same from the cache."""
        return self._losses(self.reading, self.latents, precision)

    @torch.no_grad()
    def encode(self, precision: str) -> Tensor:
        """What the cache saves."""
        return self.encoding._encoded(self._batch(self.pixels))[0]

    def _losses(self, objective: Diffusion, data: PixelSet | LatentSet, precision: str) -> Tensor:
        return objective.losses(partial(self._predict, precision), self._batch(data))

    def _predict(self, precision: str, *inputs: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.model(*inputs)

    def _batch(self, data: PixelSet | LatentSet) -> dict[str, Any]:
        batch = default_collate([data[key] for key in self.keys])
        text = {name: value.to(self.device) for name, value in batch["text"].items()}
        moved = {name: value.to(self.device) for name, value in batch.items() if name not in ("text", "seed")}
        return moved | {"text": text, "seed": batch["seed"]}


def _squares(case: Case) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (case.batch, case.side, case.side, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def _photos(count: int) -> Files:
    """JPEG files with as many bytes a pixel as a phone's, about 0.3: large shapes, and a sensor's grain."""
    random, folder = np.random.default_rng(0), Path(tempfile.mkdtemp(dir=os.environ["VISLORA_CACHE"]))
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        shapes = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(PHOTO)
        grain = random.normal(0.0, 6.0, (PHOTO[1], PHOTO[0], 3))
        Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    print(f"{sum(file.stat().st_size for file in files) / count / PHOTO[0] / PHOTO[1]:.2f} bytes a pixel of the photos")
    return Files(files)


def _compare(name: str, steps: Steps, precision: str, rounds: int) -> None:
    accelerator = new_accelerator(Precision(precision))
    casts = CastOnce(steps.model, autocast_dtype(Precision(precision)))
    kinds = {"without": casts, "cached": casts, "encode": casts, "anew": nullcontext()}

    def seconds(kind: str) -> float:
        since = time.perf_counter()
        with training_attention(accelerator), kinds[kind]:
            result = getattr(steps, "cached" if kind == "anew" else kind)(precision)
            if result.requires_grad:
                result.mean().backward()
        if steps.device.type == "cuda":
            torch.cuda.synchronize()
        steps.model.zero_grad()
        return time.perf_counter() - since

    times = in_turns({kind: partial(seconds, kind) for kind in kinds}, rounds)
    without, cached, encode = (f"{1e3 * statistics.median(times[k]):9.0f} ms" for k in ("without", "cached", "encode"))
    ratios = f"{ratio(times['without'], times['cached']):8.2f}{encode:>12}{ratio(times['cached'], times['anew']):9.2f}"
    print(f"{name:24}{precision:>10}{without:>12}{cached:>12}{ratios}", flush=True)


def stable_diffusion() -> StableDiffusionPipeline:
    """Of Stable Diffusion 1.5's shape, with random weights and a small vocabulary."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    models: dict[str, nn.Module] = {
        "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
        "text_encoder": CLIPTextModel(config),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
    }
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    tokenizer.model_max_length = 77
    return StableDiffusionPipeline(
        **{name: model.eval().requires_grad_(False) for name, model in models.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
