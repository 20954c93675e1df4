"""python -m vislora.extract tuned=runs/…/model out=FOLDER rank=16 ['ignore=[cls_token,pos_embed]']

Turns a fully tuned model into an adapter: the truncated SVD of what training changed, and the energy each layer keeps.
A ViT's class token and positions fit no adapter, and are left out with ignore. From two plain files, as of a pipeline's
UNet: base=BASE.safetensors tuned=TUNED.safetensors. Nothing in there tells embeddings from layers: name those that were
trained, as 'trained=[embeddings.token_embedding]'. With component=unet, text_encoder_2, … the result is a file for that
model of a pipeline; without, a PEFT folder for the model itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config.commands import ExtractConfig
from vislora.config.model import ModelConfig
from vislora.errors import AdapterError, ConfigError, first_three
from vislora.files import free
from vislora.paths import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from vislora.lora.energy import Computed


def extract(config: ExtractConfig) -> Computed:
    """Write the adapter into `config.out`: as a PEFT folder, or of a pipeline's component as diffusers' file.

    Raises:
        VisloraError: a mistake in the settings, weights that can't be read, or changes that no adapter can hold.
    """
    from vislora.formats.detect import save_adapter
    from vislora.formats.peft import ABOUT

    out, tuned = free(config.out), user_path(config.tuned)
    if (tuned / "model_index.json").is_file():
        raise ConfigError(
            f"tuned={tuned} is a whole pipeline; give a file of one of its models, as {tuned}/unet/….safetensors, "
            "and the base's with base=FILE"
        )
    if tuned.is_dir() and (tuned / "config.json").is_file() and not (tuned / ABOUT).is_file():
        raise ConfigError(
            f"tuned={tuned} is a model's folder without {ABOUT}, as diffusers writes them; give the .safetensors file "
            "in it, and the base's with base=FILE"
        )
    if config.component is not None:
        _check_component(config.component, tuned)
    computed = _from_folder(config) if tuned.is_dir() else _from_files(config)
    save_adapter(computed.adapter, out)
    return computed


def _check_component(component: str, tuned: Path) -> None:
    from vislora.formats.components import COMPONENTS

    if component not in COMPONENTS:
        raise ConfigError(f"component={component}: expected one of {', '.join(COMPONENTS)}")
    if tuned.is_dir():
        raise ConfigError(f"component={component} is a pipeline's, and {tuned} holds a classifier; leave it out")


def _from_folder(config: ExtractConfig) -> Computed:
    from vislora.lora import Adapters, extraction
    from vislora.lora.adaptable import unadaptable
    from vislora.models.vit import build_vit, check_held, state_dict_once, untrained_names
    from vislora.recognizer import build_base, read_about

    about = read_about(user_path(config.tuned))
    model, sha256 = build_base(about, config.tuned, config.base)
    check_held(model)
    tuned = build_vit(ModelConfig(name=f"local-dir:{config.tuned}"), len(about["classes"]))
    trained = [*untrained_names(model), *config.trained]
    computed = extraction.extract(
        state_dict_once(model),
        state_dict_once(tuned),
        config.rank,
        config.energy,
        trained,
        config.ignore,
        unadaptable(model),
    )
    Adapters(model).load("extracted", computed.adapter)  # an error, where it wouldn't fit the model
    about |= {"weights_sha256": sha256, "extracted_from": config.tuned}
    return replace(computed, adapter=replace(computed.adapter, about=about))


def _from_files(config: ExtractConfig) -> Computed:
    from vislora.formats.components import of_component, only_component, with_component
    from vislora.formats.single_file import WHOLE
    from vislora.lora import extraction

    if config.base is None:
        raise ConfigError(f"tuned={config.tuned} is no folder that names its base weights; give them with base=FILE")
    base, tuned = _weights("base", config.base), _weights("tuned", config.tuned)
    if strange := next((name for name in tuned if name.startswith(WHOLE)), None):
        raise ConfigError(
            f"tuned={config.tuned} is a whole checkpoint, with {strange}, in whose names no program reads an adapter; "
            "save it and the base as folders, by diffusers' from_single_file(FILE).save_pretrained(FOLDER), and give "
            "FOLDER/unet/….safetensors of both"
        )
    if config.component is not None:
        _check_layers(config.component, only_component(tuned), config.tuned)
    computed = extraction.extract(base, tuned, config.rank, config.energy, config.trained, config.ignore)
    if config.component is None:
        return computed
    if whole := list(computed.adapter.trained):
        raise AdapterError(
            f"{first_three(whole)} would be kept in full, which diffusers' files can't hold; leave them out with "
            f"ignore=[{whole[0]}.*], or component={config.component}, for a PEFT folder"
        )
    named = {with_component(f"{config.component}.{name}"): share for name, share in computed.energy.items()}
    return replace(computed, adapter=of_component(computed.adapter, config.component), energy=named)


def _check_layers(component: str, told: str | None, file: str) -> None:
    """Refuse layers that are another component's by their names: all UNets are told by theirs, and CLIP, which is no
    pipeline's third text encoder."""
    fits = {"unet": told == "unet", "text_encoder_3": told is None}
    if not fits.get(component, told is None or component.startswith(told)):
        raise ConfigError(f"component={component}: tuned={file} has the layers of {told or 'another model'}")


def _weights(key: str, path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(user_path(path))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{key}={path} can't be read as a .safetensors file: {error}") from None


def _main(config: ExtractConfig, _out: Path) -> None:
    print(extract(config).table())
    print(f"adapter: {config.out}")


if __name__ == "__main__":
    command("extract", _main)
