"""Text-to-image pipelines: the one that ships, a folder, or a name on the hub."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from vislora.config.model import PipelineConfig
from vislora.data.cache import content_key, weights_key
from vislora.errors import ModelError
from vislora.hub import local_or_hub
from vislora.models.denoiser import Reader, encode_images, encode_text, text_encoders, tokenize
from vislora.models.families import ENCODERS, family_of, lengths_of
from vislora.models.whole import check_vocabulary, open_whole
from vislora.paths import ASSETS

EMBEDDED = ASSETS / "sd_birds"
_PIXELS_AT_ONCE = 1024 * 1024  # through the autoencoder, for which Stable Diffusion's takes 3 GB in float32
_LATENTS_OF_FLUX = 128  # of a side; its transformer's config doesn't tell
_OF_THE_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version")


def load_pipeline(config: PipelineConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen pipeline of diffusers in eval mode, its weights from safetensors alone, its safety checker left out with
    the feature extractor, whose class in older pipelines is gone from transformers.

    Raises:
        ModelError: no such folder or model, one that diffusers can't open, one that lacks weights, or a scheduler that
            its pipeline can't draw with.
    """
    with quiet_imports():
        from diffusers import DiffusionPipeline
    left_out = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}

    def opening(source: str) -> Any:
        folder = Path(source)
        if not folder.is_dir():
            files = {"revision": config.revision, "variant": config.variant, "use_safetensors": True}
            folder = Path(DiffusionPipeline.download(source, **files, **left_out))
        models = _models(folder, config.variant, dtype)
        return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **models, **left_out)

    pipe = _opened(config, opening)
    _check_scheduler(config, pipe)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    if config.gradient_checkpointing:
        getattr(pipe, family_of(pipe).component).enable_gradient_checkpointing()
    return pipe


def _check_scheduler(config: PipelineConfig, pipe: Any) -> None:
    # by the denoiser's class: DreamLite's pipelines have a unet of another one, and draw by flow matching
    denoiser = type(getattr(pipe, "unet", None)).__name__
    if denoiser == "UNet2DConditionModel" and not hasattr(pipe.scheduler, "init_noise_sigma"):
        raise ModelError(
            f"{config.name} has {type(pipe.scheduler).__name__}, with which {type(pipe).__name__} can't draw: it "
            "scales its first noise by init_noise_sigma, which schedulers for flow matching don't have; put the "
            "scheduler that the pipeline was trained with into scheduler/"
        )


def pipeline_class(config: PipelineConfig) -> type:
    """diffusers' class of a pipeline, told without its weights.

    Raises:
        ModelError: as `load_pipeline`; or diffusers has no such class.
    """
    with quiet_imports():
        from diffusers import DiffusionPipeline
    return class_named(_class_in(config, DiffusionPipeline))


def class_named(name: str) -> type:
    """diffusers' class of pipelines by its name.

    Raises:
        ModelError: it has none.
    """
    with quiet_imports():
        import diffusers

        found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    raise ModelError(f"{name} is no class of pipelines of diffusers {diffusers.__version__}; one is FluxPipeline")


def scheduler_class(config: PipelineConfig) -> str:
    """The name of the class of a pipeline's scheduler, told without its weights.

    Raises:
        ModelError: as `load_pipeline`.
    """
    with quiet_imports():
        from diffusers import DDPMScheduler
    return _class_in(config, DDPMScheduler, "scheduler")


def resolution(config: PipelineConfig) -> int:
    """Pixels of a side of the square that a pipeline was made for, told without its weights.

    Raises:
        ModelError: as `load_pipeline`; or its configs don't tell.
    """
    with quiet_imports():
        from diffusers import AutoencoderKL, DiffusionPipeline
    denoiser = "unet" if "unet" in _settings_in(config, DiffusionPipeline) else "transformer"
    side = _settings_in(config, AutoencoderKL, denoiser).get("sample_size") or _LATENTS_OF_FLUX
    levels = _settings_in(config, AutoencoderKL, "vae").get("block_out_channels")
    if not isinstance(side, int) or not isinstance(levels, list):
        raise ModelError(f"the size of the pictures that {config.name} draws isn't in its configs; give data.size")
    return side * 2 ** (len(levels) - 1)


def readers_of(config: PipelineConfig) -> list[Reader]:
    """`vislora.models.denoiser.readers`, told without the pipeline's weights; none where its family or a
    tokenizer isn't known.

    Raises:
        ModelError: as `load_pipeline`.
    """
    with quiet_imports():
        import transformers
        from diffusers import DiffusionPipeline
    index = _settings_in(config, DiffusionPipeline)
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2}
    encoders = [name for name in ENCODERS if classes.get(name)]
    found: list[Reader] = []
    lengths = lengths_of(classes.get("unet") or classes.get("transformer"), len(encoders))
    for name, length in zip(encoders, lengths, strict=True) if lengths else ():
        part = name.replace("text_encoder", "tokenizer")
        where = {"subfolder": part, "revision": config.revision}
        if (kind := getattr(transformers, classes.get(part) or "", None)) is None:
            return []
        tokenizer = _opened(config, lambda source, kind=kind, where=where: kind.from_pretrained(source, **where))
        found.append(Reader(tokenizer, length or tokenizer.model_max_length))
    return found


def _class_in(config: PipelineConfig, cls: Any, component: str | None = None) -> str:
    """The name of the class that a config is of."""
    name = _settings_in(config, cls, component).get("_class_name")
    if not isinstance(name, str):  # a list, where a file of the model's own holds it
        raise ModelError(
            f"{config.name}: the class of its {component or 'pipeline'} is {name!r}; expected one of diffusers, since "
            "models that bring code of their own aren't opened"
        )
    return name


def _settings_in(config: PipelineConfig, cls: Any, component: str | None = None) -> dict[str, Any]:
    """A component's config, or the pipeline's own; any class of its kind reads it."""
    found = _opened(config, lambda source: cls.load_config(source, subfolder=component, revision=config.revision))
    if not isinstance(found, dict):
        raise ModelError(f"{config.name}: the config of its {component or 'pipeline'} is no JSON object; fetch it anew")
    return found


def _models(folder: Path, variant: str | None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models of a pipeline's folder by component, each in the variant where it has that.

    Raises:
        ModelError: one lacks weights, or a tokenizer its words.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    varied = {name for name in components if variant and any((folder / name).glob(f"*.{variant}*.safetensors"))}
    if variant and not varied:
        raise FileNotFoundError(f"{folder} has no files of variant {variant}")  # _opened tells what to do
    found = {}
    for name, (library, cls) in components.items():
        if library not in ("diffusers", "transformers"):  # what is left out, and classes of the pipeline's own
            continue
        kind = getattr(import_module(library), cls, None)
        if hasattr(kind, "vocab_files_names"):
            check_vocabulary(kind, folder / name)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            of_dtype = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
            own = variant if name in varied else None
            found[name] = open_whole(kind, str(folder), subfolder=name, variant=own, **of_dtype)
    return found


def _opened(config: PipelineConfig, opening: Callable[[str], Any]) -> Any:
    """What diffusers makes of a pipeline's folder or name on the hub."""
    source = str(EMBEDDED) if config.name == "embedded" else local_or_hub("model.name", config.name)
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder / 'model_index.json'} is missing; expected a pipeline's folder in diffusers' layout")
    try:
        with quiet_imports():
            return opening(source)
    except ModelError:
        raise
    except Exception as error:  # diffusers and the hub client document no common class
        first = shorten(str(error), 300, break_on_hyphens=False, placeholder=" …").removesuffix(".")
        offline = (
            ""
            if folder.is_dir()
            else "; where the hub can't be reached, only models in its local cache are found, or one saved in a folder "
            "with save_pretrained: model.name=FOLDER"
        )
        variant = "" if config.variant is None else "; model.variant=null takes files without a variant"
        raise ModelError(f"diffusers can't open {config.name}: {first}{variant}{offline}") from error


class PipelineEncoder:
    """A pipeline's autoencoder and text encoders, computing on a device; see `vislora.data.encoded.Encoder`."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        encoders = [getattr(pipe, name) for name in text_encoders(pipe)]
        self._encoders = encoders
        self.image_key, self.text_key = model_key([pipe.vae]), model_key(encoders)
        if pipe.vae.dtype != torch.float32:  # other latents than what those weights give in their own dtype
            self.image_key = content_key(self.image_key, "float32")
        for module in (pipe.vae, *encoders):
            module.to(device)

    def spare(self, with_text: bool) -> None:
        """Leave the GPU's memory to training: the autoencoder goes to the CPU, and the text encoders if wanted."""
        for module in (self.pipe.vae, *(self._encoders if with_text else ())):
            module.to("cpu")

    def images(self, images: Tensor) -> Tensor:
        vae, together = self.pipe.vae, max(1, _PIXELS_AT_ONCE // images[0, 0].numel())
        dtype = vae.dtype
        vae.float()  # SDXL's overflows in fp16, and bf16 would leave eight bits of what is learned from
        latents = torch.cat([encode_images(vae, part.to(self.device)) for part in images.split(together)])
        vae.to(dtype)
        return latents

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        return tokenize(self.pipe, captions)

    @torch.no_grad()
    def text(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        return encode_text(self.pipe, {name: value.to(self.device) for name, value in tokens.items()})


def longest_side(pipe: Any) -> int | None:
    """Pixels of the longest side that the denoiser has positions for; None where any will do."""
    config = getattr(pipe, family_of(pipe).component).config
    positions = getattr(config, "pos_embed_max_size", None)
    return None if positions is None else positions * config.patch_size * pipe.vae_scale_factor


def model_key(models: Sequence[nn.Module]) -> str:
    """A hash of all that decides what models compute: their weights, and their configs."""
    configs = [m.config if isinstance(m.config, dict) else m.config.to_dict() for m in models]  # transformers' is none
    return content_key(weights_key(models), *(line for config in configs for line in settings_of(config)))


def configs_key(pipe: Any) -> str:
    """A hash of what decides, beside the weights, what is learned: what stands in the configs of the denoiser, the
    autoencoder and the scheduler. Not what diffusers adds by default, which is more with each of its versions."""
    found = []
    for part in (family_of(pipe).component, "vae", "scheduler"):
        config = dict(getattr(pipe, part).config)
        added = config.pop("_use_default_values", ())
        found += [f"{part}.{line}" for line in settings_of({k: v for k, v in config.items() if k not in added})]
    return content_key(*found)


def settings_of(config: Mapping[str, Any]) -> list[str]:
    """A config's entries but for those that tell by what and from where it was saved."""
    own = [name for name in sorted(config) if not name.startswith("_") and name not in _OF_THE_FILE]
    return [f"{name}={config[name]!r}" for name in own]


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Without what diffusers and transformers print and warn of while they load."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
