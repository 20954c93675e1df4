"""Adapters of transformers in other programs' names: kohya's and ComfyUI's of Flux, Wan, Z-Image and others, XLabs', ….

diffusers has a converter for each kind of pipeline. They leave out what they have no place for, with a line in the log
at most. Apart from names they only take fused layers apart by rows and move scales, which both keep the sum of
||s B A||_F^2 over the layers: where each layer goes in with 1, their number must come out.
"""

from collections.abc import Mapping
from contextlib import suppress
from math import isclose
from pathlib import Path
from typing import Any

from torch import Tensor

from vislora.errors import AdapterError
from vislora.formats.components import with_component
from vislora.formats.diffusers import METADATA, from_tensors
from vislora.formats.single_file import header_json, is_foreign, layer, read_tensors, refusal, whose
from vislora.lora import Adapter
from vislora.lora.energy import update_norm

_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".alpha": "alpha",
}


def read_foreign(path: Path, pipeline: Any) -> Adapter:
    """Read the file for a pipeline of this class of diffusers.

    Raises:
        AdapterError: the class isn't given, or none of a transformer; or the file can't be read, or diffusers'
            converter would lose a part of it.
    """
    tensors, header = read_tensors(path)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    key = next(filter(is_foreign, tensors))
    if pipeline is None:
        raise AdapterError(
            f"{path}: {key!r}: {whose(key)} can be read only for a pipeline: with model.name=… where one draws, with "
            "vislora.apply(pipe, …), or by python -m vislora.export with pipeline=CLASS, as FluxPipeline"
        )
    if not hasattr(pipeline, "transformer_name"):
        raise AdapterError(f"{path}: {key!r}: {whose(key)} can't be read for {pipeline.__name__}")
    _check_kept(tensors, path, pipeline)
    return _converted(tensors, path, pipeline, header_json(header, METADATA, path))


def _check_kept(tensors: dict[str, Tensor], path: Path, pipeline: Any) -> None:
    """Every layer that acts comes through, or an error."""
    places = {key: _split(key, path) for key in tensors}
    found: dict[str, dict[str, Tensor]] = {}
    for key, (name, part) in places.items():
        found.setdefault(name, {})[part] = tensors[key]
    norms = {name: update_norm(layer(name, parts, path)) for name, parts in found.items()}
    of_norm_1 = {
        key: tensors[key] / norms[name] if part == "up" and norms[name] else tensors[key]
        for key, (name, part) in places.items()
    }
    wanted = sum(norm > 0 for norm in norms.values())
    kept = sum(update_norm(low) ** 2 for low in _converted(of_norm_1, path, pipeline).layers.values())
    if not isclose(kept, wanted, abs_tol=1e-3):
        raise AdapterError(
            f"{path}: diffusers' converter for {pipeline.__name__} keeps {kept:.5g} of its {wanted} layers; save it in "
            "diffusers' format with the program that trained it"
        )


def _converted(
    tensors: dict[str, Tensor], path: Path, pipeline: Any, settings: Mapping[str, Any] | None = None
) -> Adapter:
    try:
        converted = _by_diffusers(tensors, pipeline)
    except Exception as error:  # the converters document none, and raise what comes
        told = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise AdapterError(f"{path}: diffusers can't convert it for {pipeline.__name__}: {told}") from error
    if same := next(filter(is_foreign, converted), None):
        with suppress(Exception):  # some know a layer's names with kohya's names of matrices alone
            converted = _by_diffusers({_in_kohyas_words(key): tensor for key, tensor in tensors.items()}, pipeline)
    if any(map(is_foreign, converted)):
        raise AdapterError(f"{path}: {same!r}: {whose(same)} can't be read for {pipeline.__name__}")
    # cloned lest two share memory
    return from_tensors({key: tensor.clone() for key, tensor in converted.items()}, path, settings)


def _by_diffusers(tensors: dict[str, Tensor], pipeline: Any) -> dict[str, Tensor]:
    # a copy, since some converters scale text encoders in place
    converted = pipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()})
    # a transformer's own names, as its save_lora_adapter writes them, are nothing to convert
    if any(key.startswith("transformer_blocks.") for key in converted):
        return {with_component(key, "transformer"): tensor for key, tensor in converted.items()}
    return converted


def _in_kohyas_words(key: str) -> str:
    return key.replace(".lora_A.weight", ".lora_down.weight").replace(".lora_B.weight", ".lora_up.weight")


def _split(key: str, path: Path) -> tuple[str, str]:
    """The layer that a key belongs to, and which of its parts it is."""
    end = next((end for end in _ENDS if key.endswith(end)), None)
    if end is None:
        raise refusal(key, path)
    return key.removesuffix(end), _ENDS[end]
