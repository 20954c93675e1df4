"""The one-file format of kohya's sd-scripts, read by A1111, ComfyUI and diffusers.

Every reader applies alpha / rank as the scale. diffusers reads one alpha for all attention layers: where layers differ
in theirs, the file has one and the difference is folded into lora_up. DoRA's magnitudes are there as ComfyUI reads them
(`dora_scale`); diffusers drops them from this format with a warning, so its own file is the one to give it. So it is
for text encoders of which out_proj isn't adapted: diffusers (0.42) knows kohya's names of them by that layer alone.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from vislora.errors import AdapterError
from vislora.files import write_tensors
from vislora.formats.components import as_in_files
from vislora.formats.kohya_names import PREFIXES, from_kohya, numbered_as_sdxl, to_kohya
from vislora.formats.single_file import ABOUT, check_writable, check_written, header_json, layer, read_tensors, refusal
from vislora.lora import Adapter, LowRankWeights

_ENDS = {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha", "magnitude": ".dora_scale"}
_VERSIONS = {
    1: ("sd_v1", "stable-diffusion-v1"),
    2: ("sd_v2", "stable-diffusion-v2-512"),
    3: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def write_kohya(adapter: Adapter, path: Path) -> Path:
    """Write the file, as `path` or into the folder `path` under its name; then read it back and compare.

    Returns:
        the file.

    Raises:
        AdapterError: something beside low-rank pairs, or a model other than Stable Diffusion 1, 2 or XL.
    """
    check_writable(adapter, "kohya's format")
    file = path if path.suffix == ".safetensors" else path / f"{path.name}.safetensors"
    adapter = as_in_files(adapter)
    version = _version(adapter)
    by_path = not numbered_as_sdxl(adapter.layers)  # ComfyUI and diffusers read paths as well
    alphas = {name: weights.scale * weights.rank for name, weights in adapter.layers.items()}
    alpha = Counter([alpha for alpha in alphas.values() if alpha] or [1.0]).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for name, weights in adapter.layers.items():
        key = to_kohya(name, version == 3, by_path)
        up = weights.lora_B if alphas[name] == alpha else weights.lora_B.float() * (alphas[name] / alpha)
        parts = {"down": weights.lora_A, "up": up, "alpha": torch.tensor(alpha)}
        if weights.magnitude is not None:
            parts["magnitude"] = weights.magnitude.view(-1, *[1] * (weights.lora_A.dim() - 1))
        tensors |= {f"{key}{_ENDS[part]}": tensor.contiguous() for part, tensor in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, file, _header(adapter, tensors, alpha, version, file.stem))
    check_written(adapter, file, read_kohya)
    return file


def read_kohya(path: Path) -> Adapter:
    """Read the file, as vislora or another trainer wrote it.

    Raises:
        AdapterError: it can't be read, or holds something that would be lost.
    """
    tensors, header = read_tensors(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part = next((part for part, end in _ENDS.items() if key.endswith(end)), None)
        if part is None:
            raise refusal(key, path)
        found.setdefault(key.removesuffix(_ENDS[part]), {})[part] = tensor
    layers: dict[str, LowRankWeights] = {}
    for key, parts in found.items():
        try:
            name = from_kohya(key)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}; in this format Stable Diffusion 1, 2 and XL can be read") from None
        if "magnitude" in parts and parts["magnitude"].shape[:1] == (1,):
            raise AdapterError(f"{path}: {key}.dora_scale is for input columns; DoRA's own is for output rows")
        if name in layers:
            raise AdapterError(f"{path}: {key!r} is {name} a second time; which one counts?")
        layers[name] = layer(key, parts, path)
    if not layers:
        raise AdapterError(f"{path} holds no low-rank matrices")
    return Adapter(layers, about=header_json(header, ABOUT, path))


def is_kohya(key: str) -> bool:
    """Whether a tensor's key is of this format."""
    return key.startswith(tuple(f"{prefix}_" for prefixes in PREFIXES.values() for prefix in prefixes))


def _version(adapter: Adapter) -> int:
    """1, 2 or 3 (XL), told from what only that model has: the text's width, a second text encoder, deep blocks, an
    embedding of sizes, and 320 channels in the third upward block, where the others have 640."""
    widths = {w.lora_A.shape[1] for name, w in adapter.layers.items() if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    deep = any(".transformer_blocks.1." in name for name in adapter.layers)
    thin = any(w.out == 320 for name, w in adapter.layers.items() if "up_blocks.2.resnets." in name)
    parts = ("text_encoder_2.", "unet.add_embedding.")
    if deep or thin or 2048 in widths or any(name.startswith(parts) for name in adapter.layers):
        return 3
    return 2 if 1024 in widths else 1


def _header(adapter: Adapter, tensors: dict[str, Tensor], alpha: float, version: int, title: str) -> dict[str, str]:
    """What other programs show of a file, and choose the base model by."""
    ranks = {weights.rank for weights in adapter.layers.values()}
    convolutions = {w.rank for w in adapter.layers.values() if w.lora_A.dim() == 4 and w.lora_A.shape[-1] > 1}
    arguments = {"conv_dim": str(max(convolutions)), "conv_alpha": str(alpha)} if convolutions else {}
    raw = safetensors.torch.save(tensors)
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    base, architecture = _VERSIONS[version]
    return {
        "ss_v2": str(version == 2),
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": title,
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": title,
        ABOUT: json.dumps(adapter.about),
    }
