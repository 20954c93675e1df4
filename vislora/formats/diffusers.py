"""diffusers' adapter file, `pytorch_lora_weights.safetensors`, opened by `pipe.load_lora_weights`.

UNet (or transformer) and text encoders lie in one file, each key beginning with its component. Readers that don't know
the header take every scale as 1, so the scale is folded into lora_B, and the header says alpha = rank.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vislora.errors import AdapterError
from vislora.files import write_tensors
from vislora.formats.components import (
    as_in_files,
    by_component,
    only_component,
    tell_no_component,
    with_component,
)
from vislora.formats.peft import check_readable, with_settings
from vislora.formats.single_file import (
    ABOUT,
    check_writable,
    check_written,
    header_json,
    is_foreign,
    layer,
    magnitude_of,
    read_tensors,
    refusal,
)
from vislora.lora import Adapter

FILE = "pytorch_lora_weights.safetensors"

METADATA = "lora_adapter_metadata"
"""The header's key for PEFT's settings: a pipeline's by component, `unet.r`, a model's own, `r`."""

# How diffusers, PEFT and trainers have spelled the two matrices over time, in UNets and in text encoders.
_DOWN = tuple(
    f"{end}.weight" for end in (".lora_A", ".lora.down", ".lora_linear_layer.down", "_lora.down", ".lora_down")
)
_UP = tuple(f"{end}.weight" for end in (".lora_B", ".lora.up", ".lora_linear_layer.up", "_lora.up", ".lora_up"))
_MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_WRITTEN = (_DOWN[0], _UP[0], _MAGNITUDE[0])
_WRITTEN_TEXT = (_DOWN[2], _UP[2], _MAGNITUDE[1])  # transformers finds magnitudes only under the longer name
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def write_diffusers(adapter: Adapter, path: Path) -> Path:
    """Write the file, into the folder `path` or as `path` if it ends in .safetensors; then read it back and compare.

    Returns:
        the file.

    Raises:
        AdapterError: what `check_holdable` refuses, or names that are no pipeline's.
    """
    check_holdable(adapter)
    file = path if path.suffix == ".safetensors" else path / FILE
    adapter = as_in_files(adapter)
    tensors: dict[str, Tensor] = {}
    for name, weights in adapter.layers.items():
        down, up, magnitude = _WRITTEN_TEXT if name.startswith("text_encoder") else _WRITTEN
        tensors[f"{name}{down}"] = weights.lora_A
        tensors[f"{name}{up}"] = weights.lora_B.float() * weights.scale  # in 16 bits it would be rounded
        if weights.magnitude is not None:
            tensors[f"{name}{magnitude}"] = magnitude_of(weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        f"{component}.{key}": value
        for component, part in by_component(adapter).items()
        for key, value in _config(component, part).items()
    }
    header = {"format": "pt", METADATA: json.dumps(settings, sort_keys=True), ABOUT: json.dumps(adapter.about)}
    write_tensors(tensors, file, header)
    check_written(adapter, file, read_diffusers)
    return file


def check_holdable(adapter: Adapter) -> None:
    """Refuse an adapter that the file can't hold, before anything is written.

    Raises:
        AdapterError: it has something beside low-rank pairs, or layers with and without DoRA in one component, which
            PEFT can't hold in one model.
    """
    check_writable(adapter, "diffusers' file")
    for component, part in by_component(adapter).items():
        if len({weights.magnitude is None for weights in part.layers.values()}) > 1:
            raise AdapterError(f"diffusers can't hold layers with and without DoRA in one {component}")


def read_diffusers(path: Path) -> Adapter:
    """Read the file, or the folder that holds it, as vislora, diffusers or its training scripts wrote it.

    Raises:
        AdapterError: it can't be read, or holds something that would be lost.
    """
    path = path / FILE if path.is_dir() else path
    tensors, header = read_tensors(path)
    adapter = from_tensors(tensors, path, header_json(header, METADATA, path))
    return replace(adapter, about=header_json(header, ABOUT, path))


def from_tensors(tensors: Mapping[str, Tensor], path: Path, settings: Mapping[str, Any] | None = None) -> Adapter:
    """An adapter from tensors by their keys in the file, and PEFT's settings from its header, if it has them.

    Raises:
        AdapterError: as `read_diffusers`; it names `path`.
    """
    found, modules = _layers(tensors, path)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in (settings or {}).items():
        component, _, own_key = key.rpartition(".")
        configs.setdefault(component, {"peft_type": "LORA"})[own_key] = value
    for own in configs.values():
        check_readable(own, path)
    layers = {}
    for name, parts in found.items():
        own = configs.get(name.partition(".")[0], configs.get(""))
        if own and "alpha" in parts:
            raise AdapterError(f"{path}: {name} has an alpha of its own and one in the header; which one counts?")
        weights = layer(name, parts, path)
        layers[name] = with_settings(weights, own, modules[name], path) if own else weights
    if not layers:
        raise AdapterError(f"{path} holds no low-rank matrices")
    return Adapter(layers)


def _layers(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The parts of each layer by its name; and each one's module as the file spells it, which is what the patterns of
    its settings are for: CLIP's level isn't in the names of models that lack it."""
    found: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    split = {key: _split(key, path) for key in tensors}
    otherwise = only_component(tensors)
    # as the save_lora_adapter of many transformers has it: what the file is applied to knows which one
    bare = tell_no_component(spelled for spelled, _ in split.values())
    for key, tensor in tensors.items():
        spelled, part = split[key]
        try:
            name = spelled if bare else with_component(spelled, otherwise)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        if part in found.setdefault(name, {}):
            raise AdapterError(f"{path}: {key!r} is a second {part} matrix of {name}; which one counts?")
        found[name][part] = tensor
        modules[name] = spelled if bare else spelled.removeprefix(f"{name.partition('.')[0]}.")
    return found, modules


def _split(key: str, path: Path) -> tuple[str, str]:
    """The layer that a key belongs to, as the file spells it, and which part it is."""
    parts = (("down", _DOWN), ("up", _UP), ("alpha", (".alpha",)), ("magnitude", _MAGNITUDE))
    found = [(part, end) for part, ends in parts for end in ends if key.endswith(end)]
    if not found or is_foreign(key):
        raise refusal(key, path)
    part, end = found[0]
    name = key.removesuffix(end).replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if end.startswith("_") and name.startswith("text_encoder"):
        name = f"{parent}.{_OLD_TEXT.get(last, last)}"
    elif end.startswith("_") and last == "to_out":
        name = f"{name}.0"
    return name, part


def _config(component: str, adapter: Adapter) -> dict[str, Any]:
    """PEFT's settings of one component, as its `LoraConfig` takes them; every scale is 1.

    PEFT matches names at their ends; without `text_model` they fit CLIP as transformers has it now and had it before.
    In other models a pattern is for the whole name, which may be the end of another.
    """
    ranks = {name.removeprefix("text_model."): weights.rank for name, weights in adapter.layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    start = "" if component.startswith("text_encoder") else "^"
    other = {f"{start}{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,  # diffusers would go on dropping out while it draws
        "use_rslora": False,
        "use_dora": any(weights.magnitude is not None for weights in adapter.layers.values()),
        "bias": "none",
        "peft_type": "LORA",
    }
