"""Pictures drawn by a pipeline: which one belongs to adapters, how it is opened, and pictures by prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vislora.config import PipelineConfig, Precision
from vislora.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from vislora.lora import Adapter


def pipeline_of(config: PipelineConfig, files: Sequence[str], adapters: Sequence[Adapter]) -> PipelineConfig:
    """The pipeline to draw with: the given one, or with `name=auto` that on which all the adapters were trained.

    Raises:
        ConfigError: an adapter doesn't say what it was trained on, or they were trained on several.
    """
    if config.name != "auto":
        return config
    if not adapters:
        return PipelineConfig(name="embedded")
    bases = []
    for file, adapter in zip(files, adapters, strict=True):
        base = adapter.about.get("model")
        if not isinstance(base, dict) or not isinstance(base.get("name"), str):
            raise ConfigError(f"{file} doesn't say what model it belongs to; give model.name=FOLDER or a hub's name")
        bases.append(PipelineConfig(base["name"], base.get("revision"), base.get("variant")))
    if other := [(file, base) for file, base in zip(files, bases, strict=True) if base != bases[0]]:
        raise ConfigError(
            f"{other[0][0]} was trained on {other[0][1].name}, {files[0]} on {bases[0].name}; choose with model.name=…"
        )
    return bases[0]


def open_pipeline(model: PipelineConfig, wanted: Precision) -> Any:
    """A pipeline on the GPU in the precision wanted, where there is one; on the CPU in float32.

    Raises:
        ModelError: it can't be opened.
    """
    import torch

    from vislora.models.diffusion import load_pipeline
    from vislora.precision import autocast_dtype, resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(wanted, device) if device.type == "cuda" else Precision.fp32
    return load_pipeline(model, autocast_dtype(precision) or torch.float32).to(device)


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: int | None = None,
    at_once: int = 8,
    what: str = "drawing",
) -> list[Image.Image]:
    """A picture of each prompt with each seed: those of the first prompt, then those of the second, …

    A picture's noise hangs on its seed and prompt alone (see `noise_seed`): the same for whatever adapter is in the
    pipeline, and whatever else is drawn.
    """
    import torch
    from tqdm import tqdm

    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images: list[Image.Image] = []
    with tqdm(total=len(jobs), desc=what, unit="", delay=2, leave=False, disable=None) as bar:
        for start in range(0, len(jobs), at_once):
            part = jobs[start : start + at_once]
            drawn = pipe(
                [prompt for prompt, _ in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(noise_seed(seed, prompt)) for prompt, seed in part],
                height=size,
                width=size,
            )
            images += drawn.images
            bar.update(len(part))
    return images


def noise_seed(seed: int, prompt: str) -> int:
    """What torch's generator is seeded with for a picture; `python -m vislora.generate seeds=[…]` takes it too."""
    from vislora.data.cache import content_key

    return int(content_key(seed, prompt)[:12], 16)
