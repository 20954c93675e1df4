"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, opened unchanged by PEFT.

What PEFT has no field for (the base weights' hash, the preprocessing, the classes) lies beside them in vislora.json,
which PEFT ignores. Safetensors and JSON only: nothing in a file is executed.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vislora.errors import AdapterError
from vislora.files import write_json, write_tensors
from vislora.formats.peft_attention import as_units, is_part, own_name, peft_name
from vislora.lora import Adapter, LowRankWeights
from vislora.lora.names import fits

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ABOUT = "vislora.json"

_PREFIX = "base_model.model."
_SUFFIXES = ("A.weight", "B.weight", "magnitude_vector")  # what follows ".lora_" in a key; the last with DoRA only
_BIASES = (".bias", ".in_proj_bias")
# What a PEFT adapter may have that would change its output and isn't read here: (key, harmless values, what it is).
_UNSUPPORTED = [
    ("bias", ("none", "lora_only", "all", None), "trained biases of an unknown kind"),
    ("lora_bias", (False, None), "a bias on lora_B"),
    ("fan_in_fan_out", (False, None), "transposed (Conv1D) weights"),
    ("megatron_config", (None,), "Megatron layers"),
    ("trainable_token_indices", (None,), "trained token embeddings"),
    ("alora_invocation_tokens", (None,), "an update that waits for a prompt's tokens"),
    ("init_lora_weights", (True, False, None, "gaussian", "orthogonal", "eva"), "a start that changes the base"),
]


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` opens; then read it back and compare.

    Pairs over parts of a fused projection are widened to one pair (`LowRankWeights.as_one_pair`), since PEFT has no
    partial ones: the same output, with zero rows in B. The same goes for ranks within an nn.MultiheadAttention, see
    `vislora.formats.peft_attention`.

    Raises:
        AdapterError: the adapter has no low-rank layers, mixes LoRA, rsLoRA and DoRA, or reads back differently.
    """
    if not adapter.layers:
        raise AdapterError(
            "a PEFT folder needs at least one LoRA layer; export a probe or a full model as timm weights"
        )
    wide = replace(adapter, layers=as_units({name: w.as_one_pair() for name, w in adapter.layers.items()}))
    tensors: dict[str, Tensor] = {}
    for layer, weights in wide.layers.items():
        name = peft_name(layer, wide.layers)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = weights.lora_A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = weights.lora_B.contiguous()
        if weights.magnitude is not None:
            # one length per output row; of a convolution in the shape of its output's channels
            shape = (-1,) if weights.lora_A.dim() == 2 else (1, -1, 1, 1)
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = weights.magnitude.view(shape).contiguous()
    for name, state in wide.trained.items():
        tensors |= {f"{_PREFIX}{name}.{key}": tensor.contiguous() for key, tensor in state.items()}
    for name, bias in wide.biases.items():
        module, _, own = name.rpartition(".")
        # PEFT keeps an adapted layer as the base_layer of another
        adapted = module in wide.layers or is_part(module, wide.layers)
        key = f"{peft_name(module, wide.layers)}.base_layer.{own}" if adapted else name
        tensors[f"{_PREFIX}{key}"] = bias.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / TENSORS, {"format": "pt"})
    write_json(_config(wide), folder / CONFIG)
    write_json(adapter.about, folder / ABOUT)
    if not read_peft(folder).equals(wide):
        raise AdapterError(f"{folder}: what was written reads back differently; try another disk or file system")


def read_peft(folder: Path | str) -> Adapter:
    """Read an adapter folder, written by vislora or by PEFT.

    Raises:
        AdapterError: a file is missing or malformed, or the adapter uses something that would be lost.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    check_readable(config, folder / CONFIG)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / TENSORS} can't be read: {error}") from None
    about = _read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    layers = _layers({k: t for k, t in tensors.items() if ".lora_" in k}, config, folder)
    try:
        dropout = float(config.get("lora_dropout") or 0.0)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: lora_dropout is malformed: {error}") from None
    rest = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    trained: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        if _is_copy(key, rest):
            continue
        if found := _split_trained(key, config.get("modules_to_save") or []):
            trained.setdefault(found[0], {})[found[1]] = tensor
        elif key.startswith(_PREFIX) and key.endswith(_BIASES) and config.get("bias") not in ("none", None):
            module, _, own = key.removeprefix(_PREFIX).rpartition(".")
            biases[f"{own_name(module.removesuffix('.base_layer'))}.{own}"] = tensor
        else:
            raise AdapterError(
                f"{folder / TENSORS}: unexpected tensor {key!r}, which belongs to none of modules_to_save "
                f"{config.get('modules_to_save') or []}; it would be lost"
            )
    if config.get("bias") == "lora_only" and not biases:
        raise AdapterError(
            f"{folder / CONFIG}: bias='lora_only' says that biases were trained, and {TENSORS} holds none: PEFT before "
            "0.20 left them out. Save it again with a newer PEFT; or set bias to none there, where the layers have "
            "none, or to do without"
        )
    return Adapter(layers, trained, dropout, about, biases)


def check_readable(config: dict[str, Any], path: Path) -> None:
    """PEFT's settings, read from `path`, say nothing that would change the output and is lost here.

    Raises:
        AdapterError: they do.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be read")
    for key, harmless, what in _UNSUPPORTED:
        if config.get(key) not in harmless:
            raise AdapterError(f"{path}: {key}={config[key]!r} ({what}) can't be read; it would be lost")


def alpha_of(config: dict[str, Any], module: str, path: Path) -> float:
    """The alpha that PEFT's settings, read from `path`, give a module: by the first pattern of `alpha_pattern` that
    fits its name, or `lora_alpha`.

    Raises:
        AdapterError: it is no finite number, or a pattern no regular expression.
    """
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = float(
            next((value for pattern, value in patterns if fits(pattern, module)), config.get("lora_alpha", 8))
        )
        if not math.isfinite(alpha):
            raise ValueError(f"{alpha} is no finite number")
    except (AdapterError, AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: lora_alpha or alpha_pattern is malformed: {error}") from None
    return alpha


def _layers(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, LowRankWeights]:
    layers = {}
    suffixes = _SUFFIXES if config.get("use_dora") else _SUFFIXES[:2]
    for key in tensors:
        module, _, suffix = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not key.startswith(_PREFIX) or suffix not in suffixes:
            raise AdapterError(f"{folder / TENSORS}: unexpected tensor {key!r}; it would be lost")
        if f"{_PREFIX}{module}.lora_A.weight" not in tensors:
            raise AdapterError(f"{folder / TENSORS}: {module}.lora_A is missing, its lora_{suffix[0]} is there")
        if suffix != "A.weight":
            continue
        a, b = tensors[key], tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        if b is None or a.dim() not in (2, 4) or a.dim() != b.dim() or a.shape[0] != b.shape[1]:
            found = "is missing" if b is None else f"has shape {list(b.shape)}"
            raise AdapterError(f"{folder / TENSORS}: {module}.lora_B {found}; lora_A has {list(a.shape)}")
        magnitude = tensors.get(f"{_PREFIX}{module}.lora_magnitude_vector")
        if config.get("use_dora") and (magnitude is None or magnitude.numel() != b.shape[0]):
            found = "is missing" if magnitude is None else f"has shape {list(magnitude.shape)}"
            raise AdapterError(
                f"{folder / TENSORS}: {module}.lora_magnitude_vector {found}; use_dora needs one of {b.shape[0]} rows"
            )
        layers[own_name(module)] = LowRankWeights(
            a.float(),
            b.float(),
            a.shape[0],
            alpha_of(config, module.removesuffix(".base_layer.out_proj"), folder / CONFIG),
            b.shape[0],
            bool(config.get("use_rslora")),
            magnitude=None if magnitude is None else magnitude.float().flatten(),
        )
    if not layers:
        raise AdapterError(f"{folder / TENSORS} holds no lora_A tensors")
    return layers


def _split_trained(key: str, modules: list[str]) -> tuple[str, str] | None:
    """The module trained in full that a tensor belongs to, and its name in there; None if there is none. PEFT names
    modules by their ends."""
    words = key.removeprefix(_PREFIX).split(".")
    for cut in range(1, len(words)):
        module = ".".join(words[:cut])
        if key.startswith(_PREFIX) and any(f".{module}".endswith(f".{name}") for name in modules):
            return module, ".".join(words[cut:])
    return None


def _is_copy(key: str, tensors: dict[str, Tensor]) -> bool:
    """With bias="all" PEFT writes the biases of modules_to_save three times: as trained, the same again, and the
    base's."""
    copies = (".modules_to_save.", ".original_module.")
    return any(part in key and key.replace(part, ".") in tensors for part in copies)


def _config(adapter: Adapter) -> dict[str, Any]:
    layers = {name: w for name, w in adapter.layers.items() if not is_part(name, adapter.layers)}
    if len({w.rslora for w in layers.values()}) > 1:
        raise AdapterError("PEFT can't hold LoRA and rsLoRA layers in one adapter")
    if len({w.magnitude is None for w in layers.values()}) > 1:
        raise AdapterError("PEFT can't hold layers with and without DoRA in one adapter")
    first = next(iter(layers.values()))
    rank, alpha = first.rank, first.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": adapter.about.get("model", {}).get("name"),
        "target_modules": list(layers),
        "modules_to_save": list(adapter.trained) or None,
        "r": rank,
        "lora_alpha": _plain(alpha),
        # without ^ a pattern would fit every name that ends in it
        "rank_pattern": {f"^{re.escape(name)}": w.rank for name, w in layers.items() if w.rank != rank},
        "alpha_pattern": {f"^{re.escape(name)}": _plain(w.alpha) for name, w in layers.items() if w.alpha != alpha},
        "lora_dropout": adapter.dropout,
        "bias": _bias_kind(adapter),
        "fan_in_fan_out": False,
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _bias_kind(adapter: Adapter) -> str:
    if not adapter.biases:
        return "none"
    return "lora_only" if all(name.rpartition(".")[0] in adapter.layers for name in adapter.biases) else "all"


def _plain(number: float) -> float | int:
    return int(number) if math.isfinite(number) and number == int(number) else number


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; an adapter folder holds {CONFIG} and {TENSORS}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a {type(value).__name__}; an object was expected")
    return value
