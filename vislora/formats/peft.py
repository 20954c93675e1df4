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

from torch import Tensor

from vislora.errors import AdapterError
from vislora.files import write_json, write_tensors
from vislora.formats.peft_attention import as_units, is_part, own_name, peft_name
from vislora.formats.single_file import layer, magnitude_of, read_tensors
from vislora.lora import Adapter, LowRankWeights
from vislora.lora.names import fits
from vislora.paths import user_path

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
ABOUT = "vislora.json"

_PREFIX = "base_model.model."
_PARTS = {"A.weight": "down", "B.weight": "up", "magnitude_vector": "magnitude"}  # by what follows ".lora_" in a key
_BIASES = (".bias", ".in_proj_bias", ".q_bias", ".v_bias")
# What a PEFT adapter may have that would change its output and isn't read here: (key, harmless values, what it is).
_UNSUPPORTED = [
    ("bias", ("none", "lora_only", "all", None), "trained biases of an unknown kind"),
    ("lora_bias", (False, None), "a bias on lora_B"),
    ("fan_in_fan_out", (False, None), "transposed (Conv1D) weights"),
    ("megatron_config", (None,), "Megatron layers"),
    ("trainable_token_indices", (None,), "trained token embeddings"),
    ("alora_invocation_tokens", (None,), "an update that waits for a prompt's tokens"),
    ("use_bdlora", (None, False), "matrices in blocks"),
    ("arrow_config", (None,), "adapters that each token is sent to"),
    ("layer_replication", (None,), "layers that are there several times"),
    (
        "init_lora_weights",
        (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
        "a start that changes the base",
    ),
]


def write_peft(adapter: Adapter, folder: Path | str) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` opens; then read it back and compare. Where that
    fails, the tensors are removed.

    Pairs over parts of a fused projection are widened to one pair (`LowRankWeights.as_one_pair`), since PEFT has no
    partial ones: the same output, with zero rows in B. The same goes for ranks within an nn.MultiheadAttention, see
    `vislora.formats.peft_attention`.

    Raises:
        AdapterError: the adapter has no low-rank layers, mixes LoRA, rsLoRA and DoRA, or reads back differently.
    """
    check_holdable(adapter)
    folder = user_path(folder)
    wide = replace(adapter, layers=as_units({name: w.as_one_pair() for name, w in adapter.layers.items()}))
    tensors: dict[str, Tensor] = {}
    for name, weights in wide.layers.items():
        key = f"{_PREFIX}{peft_name(name, wide.layers)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = weights.lora_A, weights.lora_B
        if weights.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = magnitude_of(weights)
    for name, state in wide.trained.items():
        tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in state.items()}
    for name, bias in wide.biases.items():
        module, _, own = name.rpartition(".")
        # PEFT keeps an adapted layer as the base_layer of another
        adapted = module in wide.layers or is_part(module, wide.layers)
        key = f"{peft_name(module, wide.layers)}.base_layer.{own}" if adapted else name
        tensors[f"{_PREFIX}{key}"] = bias
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, folder / TENSORS, {"format": "pt"})
    write_json(_config(wide), folder / CONFIG)
    write_json(adapter.about, folder / ABOUT)
    if not read_peft(folder).equals(wide):
        (folder / TENSORS).unlink()
        raise AdapterError(f"{folder}: what was written reads back differently; try another disk or file system")


def check_holdable(adapter: Adapter) -> None:
    """Refuse an adapter that no folder of PEFT's can hold, before anything is written.

    Raises:
        AdapterError: it has no low-rank layers, or mixes LoRA, rsLoRA and DoRA.
    """
    if not adapter.layers:
        raise AdapterError(
            "a PEFT folder needs at least one LoRA layer; export a probe or a full model as timm weights"
        )
    layers = _of_their_own(adapter).values()
    if len({w.rslora for w in layers}) > 1:
        raise AdapterError("PEFT can't hold LoRA and rsLoRA layers in one adapter")
    if len({w.magnitude is None for w in layers}) > 1:
        raise AdapterError("PEFT can't hold layers with and without DoRA in one adapter")


def read_peft(folder: Path | str) -> Adapter:
    """Read an adapter folder, written by vislora or by PEFT.

    Raises:
        AdapterError: a file is missing or malformed, or the adapter uses something that would be lost.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    check_readable(config, folder / CONFIG)
    tensors, _ = read_tensors(folder / TENSORS)
    about = _read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    layers = _layers({k: t for k, t in tensors.items() if ".lora_" in k}, config, folder)
    try:
        dropout = float(config.get("lora_dropout") or 0.0)
    except (OverflowError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: lora_dropout is malformed: {error}") from None
    rest = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    trained: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        if _is_copy(key, rest):
            continue
        if tensor.float().isnan().any():
            raise AdapterError(f"{folder / TENSORS}: {key!r} holds NaN; the training that wrote it diverged")
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
        AdapterError: they do, or one is malformed.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be read")
    for key, harmless, what in _UNSUPPORTED:
        if config.get(key) not in harmless:
            raise AdapterError(f"{path}: {key}={config[key]!r} ({what}) can't be read; it would be lost")
    for key in ("modules_to_save", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterError(f"{path}: {key} is {names!r}; a list of names was expected")


def with_settings(weights: LowRankWeights, config: dict[str, Any], module: str, path: Path) -> LowRankWeights:
    """A layer with the alpha and the kind that PEFT's settings, read from `path`, give it by its name: the alpha of the
    first pattern of `alpha_pattern` that fits, or `lora_alpha`.

    Raises:
        AdapterError: alpha is no finite number, a pattern no regular expression, or DoRA's magnitude is there without
            its setting, or the other way round.
    """
    if bool(config.get("use_dora")) != (weights.magnitude is not None):
        found = "no" if weights.magnitude is None else "a"
        raise AdapterError(f"{path}: use_dora is {config.get('use_dora')}, and {module} has {found} DoRA magnitude")
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = float(
            next((value for pattern, value in patterns if fits(pattern, module)), config.get("lora_alpha", 8))
        )
        if not math.isfinite(alpha):
            raise ValueError(f"{alpha} is no finite number")
    except (AdapterError, AttributeError, OverflowError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: lora_alpha or alpha_pattern is malformed: {error}") from None
    return replace(weights, alpha=alpha, rslora=bool(config.get("use_rslora")))


def _layers(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, LowRankWeights]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, suffix = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not key.startswith(_PREFIX) or suffix not in _PARTS:
            raise AdapterError(f"{folder / TENSORS}: unexpected tensor {key!r}; it would be lost")
        found.setdefault(module, {})[_PARTS[suffix]] = tensor
    if not found:
        raise AdapterError(f"{folder / TENSORS} holds no lora_A tensors")
    of_parameters = tuple(f".{name}" for name in config.get("target_parameters") or ())
    layers = {}
    for module, parts in found.items():
        weights = layer(module, parts, folder / TENSORS)
        plain_name = module.removesuffix(".base_layer.out_proj")
        if f".{module}.weight".endswith(of_parameters):  # alpha_pattern is then for the parameter's name
            plain_name = f"{module}.weight"
        layers[own_name(module)] = with_settings(weights, config, plain_name, folder / CONFIG)
    return layers


def _split_trained(key: str, modules: list[str]) -> tuple[str, str] | None:
    """The module trained in full that a tensor belongs to, and its name in there; None if there is none. PEFT names
    modules by their ends."""
    words = key.removeprefix(_PREFIX).split(".")
    for cut in range(1, len(words)):
        module = ".".join(words[:cut])
        if key.startswith(_PREFIX) and f"{_PREFIX}{module}".endswith(tuple(modules)):
            return module, ".".join(words[cut:])
    return None


def _is_copy(key: str, tensors: dict[str, Tensor]) -> bool:
    """With bias="all" PEFT writes the biases of modules_to_save three times: as trained, the same again, and the
    base's."""
    copies = (".modules_to_save.", ".original_module.")
    return any(part in key and key.replace(part, ".") in tensors for part in copies)


def _of_their_own(adapter: Adapter) -> dict[str, LowRankWeights]:
    """The layers that settings tell of: not the output projections that go with an attention."""
    return {name: w for name, w in adapter.layers.items() if not is_part(name, adapter.layers)}


def _config(adapter: Adapter) -> dict[str, Any]:
    layers = _of_their_own(adapter)
    first = next(iter(layers.values()))
    rank, alpha, model = first.rank, first.alpha, adapter.about.get("model")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": model.get("name") if isinstance(model, dict) else None,
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
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a {type(value).__name__}; an object was expected")
    return value
