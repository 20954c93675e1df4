"""Pictures drawn by a pipeline: which one belongs to adapters, how it is opened, and what it draws."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vislora.config.model import PipelineConfig
from vislora.config.training import Precision
from vislora.errors import ConfigError, ModelError, first_three

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from vislora.lora import Adapter

_REFUSALS = (TypeError, ValueError, IndexError, NotImplementedError, AssertionError)  # of check_inputs and schedulers
_ASKED = ("prompt", "num_inference_steps", "guidance_scale", "generator", "height", "width")


def read_adapters(config: PipelineConfig, files: Sequence[str]) -> list[Adapter]:
    """The adapters in files, read for the pipeline where it is given.

    Raises:
        AdapterError: one can't be read.
        ModelError: there is no such pipeline.
    """
    from vislora.formats.detect import read_adapter
    from vislora.models.diffusion import pipeline_class

    pipeline = pipeline_class(config) if files and config.name != "auto" else None
    return [read_adapter(file, pipeline) for file in files]


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
    """A pipeline on this process's device: on a GPU in the precision wanted, elsewhere in float32.

    Raises:
        ModelError: it can't be opened.
        ConfigError: it draws something else than a picture of a prompt.
    """
    import torch

    from vislora.models.diffusion import load_pipeline
    from vislora.precision import autocast_dtype, own_device

    pipe = load_pipeline(model, autocast_dtype(drawn_in(wanted)) or torch.float32)
    _check_draws_prompts(pipe)
    return pipe.to(own_device())


def drawn_in(wanted: Precision) -> Precision:
    """The precision that this process draws in where that is wanted."""
    from vislora.precision import own_device, resolve_precision

    device = own_device()
    return resolve_precision(wanted, device) if device.type == "cuda" else Precision.fp32


def _check_draws_prompts(pipe: Any) -> None:
    takes, kind = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    another = "give a text-to-image pipeline with model.name=…"
    if missing := [name for name in _ASKED if name not in takes]:
        raise ConfigError(f"{kind} takes no {missing[0]}: it can't be asked for pictures of prompts; {another}")
    if "num_frames" in takes:
        raise ConfigError(
            f"{kind} draws videos, and pictures are wanted; {another}, or apply the adapter in Python: "
            "vislora.apply(pipe, FILE)"
        )


def tell_cut_off(pipe: Any, prompts: Sequence[str]) -> None:
    """Tell on stderr of prompts that the pipeline doesn't read to their end."""
    from vislora.models.denoiser import cut_off, readers

    try:
        reading = readers(pipe)
    except ModelError:  # of a family that isn't known
        return
    if cut := [repr(prompts[i]) for i in cut_off(reading, prompts)]:
        most = max(reader.length for reader in reading)
        told = (
            f"prompts of more than the {most} tokens that are read, hence drawn without their end: {first_three(cut)}"
        )
        print(told, file=sys.stderr)


@dataclass(frozen=True)
class Sampling:
    """How a pipeline draws.

    Attributes:
        steps: of denoising.
        guidance: its classifier-free guidance.
        size: width and height in pixels; what the pipeline was made for by default.
        negative_prompt: what guidance leads away from; the pipeline's own by default.
    """

    steps: int
    guidance: float
    size: tuple[int, int] | None = None
    negative_prompt: str | None = None


def check_steps(scheduler: Any, steps: int, setting: str) -> None:
    """Refuse a number of sampling steps that a scheduler can't go through, before there is anything to draw.

    Schedulers have limits of their own, and tell of them at the first step or at the last.

    Args:
        setting: what the steps are called, for the message.

    Raises:
        ConfigError: it can't.
    """
    import torch

    trial, nothing = type(scheduler).from_config(scheduler.config), torch.zeros(1, 4, 8, 8)
    shift = {"mu": 1.0} if trial.config.get("use_dynamic_shifting", False) else {}  # any: a pipeline takes its own
    try:
        with torch.random.fork_rng([]):
            trial.set_timesteps(steps, **shift)
            for time in trial.timesteps:
                if hasattr(trial, "scale_model_input"):  # not in flow matching
                    trial.scale_model_input(nothing, time)
                trial.step(nothing, time, nothing)
    except _REFUSALS as error:
        raise ConfigError(
            f"{setting}={steps}: {type(scheduler).__name__}, of {scheduler.config.num_train_timesteps} times, can't "
            f"draw so: {_in_a_line(error)}; give another number of steps, or a pipeline with another scheduler"
        ) from error


def draw(
    pipe: Any,
    jobs: Sequence[tuple[str, int]],
    sampling: Sampling,
    at_once: int = 8,
    what: str = "drawing",
    accelerator: Accelerator | None = None,
) -> list[Image.Image]:
    """A picture of each job, which is a prompt and the seed of its noise.

    With `accelerator` each of its processes draws a share, and all have all pictures afterwards. Whole batches are
    dealt out, so that the number of processes leaves no trace in the pictures.

    Raises:
        ConfigError: the pipeline refuses its arguments, such as a size that isn't a multiple of its own.
    """
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    starts = range(rank * at_once, len(jobs), world * at_once)
    mine: list[tuple[int, list[Image.Image]]] = []
    for start in tqdm(starts, desc=what, unit="batch", delay=2, leave=False, disable=None if rank == 0 else True):
        part = jobs[start : start + at_once]
        negative, (width, height) = sampling.negative_prompt, sampling.size or (None, None)
        told = {} if negative is None else {"negative_prompt": [negative] * len(part)}
        try:
            with _own_noise(part[0][1]), _decoded_singly(pipe):
                drawn = pipe(
                    [prompt for prompt, _ in part],
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                    height=height,
                    width=width,
                    **told,
                )
        except _REFUSALS as error:
            raise ConfigError(f"{type(pipe).__name__} can't draw that: {_in_a_line(error)}") from error
        mine.append((start, drawn.images))
    batches = mine if accelerator is None else sorted(gather_object(mine), key=lambda batch: batch[0])
    return [image for _, images in batches for image in images]


def _in_a_line(error: Exception) -> str:
    """What it says; of a bare assertion its class."""
    return " ".join((str(error) or type(error).__name__).split())


@contextmanager
def _decoded_singly(pipe: Any) -> Iterator[None]:
    """Meanwhile an autoencoder decodes one picture at a time: eight of 1024 pixels would take it 30 GB in float32.
    Pipelines that draw in pixels have none, and some name theirs otherwise."""
    vae = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_slicing"):
        yield
        return
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_slicing()


@contextmanager
def _own_noise(seed: int) -> Iterator[None]:
    """Meanwhile torch's global random numbers are those of a seed: stochastic flow matching, as FlowMatchLCMScheduler
    has it, takes the noise of its steps from there, since its pipelines hand their generators to no scheduler."""
    import torch

    from vislora.data.order import mix

    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(mix(seed, 1))  # another one: the seed's own numbers are the picture's first noise
        yield
