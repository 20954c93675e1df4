"""Adapters in one .safetensors file: what its tensors mean together, and what is refused by name.

Nothing that changes the output may be dropped, so every key must be understood, and what was written is read back.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vislora.errors import AdapterError
from vislora.lora import Adapter, LowRankWeights

ABOUT = "vislora"
"""The header's key for what travels with an adapter: `Adapter.about` as JSON."""

_FOREIGN = {
    "diffusion_model.": "ComfyUI's own names of a model's layers",
    "lora_unet_double_blocks_": "kohya's names of Flux",
    "lora_unet_single_blocks_": "kohya's names of Flux",
    "lora_unet_joint_blocks_": "kohya's names of Stable Diffusion 3",
    "lora_unet_blocks_": "kohya's names of Wan",
    "lora_unet_layers_": "kohya's names of Z-Image",
    "lora_unet_transformer_blocks_": "kohya's names of Qwen-Image",
    "transformer_blocks.": "names without the model's own",
    "double_blocks.": "Black Forest Labs' names",
    "single_blocks.": "Black Forest Labs' names",
    "joint_blocks.": "Stability's names",
    "lora_transformer": "OneTrainer's names",
    "lycoris_": "LyCORIS' names",
}
WHOLE = ("model.diffusion_model.", "cond_stage_model.")
"""What names in a whole checkpoint, as Stability AI's and kohya's are, begin with."""

_REFUSED = {
    **dict.fromkeys(WHOLE, "a whole checkpoint"),
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    ".a1.weight": "GLoRA",
    "dora_scale": "DoRA under this name",
    "lora_mid": "LoCon's Tucker decomposition",
    ".diff_b": "a changed bias",
    ".diff": "a weight changed in full",
    ".w_norm": "a trained norm",
    ".b_norm": "a trained norm",
    "norm.": "a trained norm",
    ".bias": "a trained bias",
    "bundle_emb": "a text embedding bundled with the adapter",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a .safetensors file.

    Raises:
        AdapterError: another kind of file, or one that can't be read.
    """
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise AdapterError(
            f"{path} is a pickle, which can run any code when it is opened; get the adapter as .safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} can't be read as safetensors: {error}") from None


def header_json(header: dict[str, str], key: str, path: Path) -> dict[str, Any]:
    """The JSON object under a key of the header; empty where there is none.

    Raises:
        AdapterError: something else is there.
    """
    try:
        value = json.loads(header.get(key) or "{}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise AdapterError(f"{path}: {key} in the header is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: {key} in the header is a {type(value).__name__}; an object was expected")
    return value


def check_writable(adapter: Adapter, what: str) -> None:
    """Only low-rank pairs and DoRA's magnitudes have a place in such a file.

    Raises:
        AdapterError: the adapter holds something else.
    """
    for kind, names in {"modules trained in full": adapter.trained, "trained biases": adapter.biases}.items():
        if names:
            raise AdapterError(f"{what} has no place for {kind}: {', '.join(list(names)[:8])}; write a PEFT folder")


def layer(name: str, parts: dict[str, Tensor], path: Path) -> LowRankWeights:
    """One low-rank pair from its `down` and `up` matrices, its `alpha` (without one its scale is 1, as in other
    readers), and DoRA's `magnitude`.

    Raises:
        AdapterError: a matrix is missing or holds something else than numbers, or they don't fit together.
    """
    down, up, magnitude = (parts.get(part) for part in ("down", "up", "magnitude"))
    if down is None or up is None:
        missing = "lora_A (down)" if down is None else "lora_B (up)"
        raise AdapterError(f"{path}: {name} has no {missing} matrix")
    multiply = down.dim() in (2, 4) and up.shape[1:] == (down.shape[0], *[1] * (down.dim() - 2))
    if not multiply or 0 in (*down.shape[1:], up.shape[0]):
        raise AdapterError(
            f"{path}: {name} has matrices of shapes {list(down.shape)} and {list(up.shape)}, which don't multiply"
        )
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise AdapterError(
            f"{path}: {name} has DoRA magnitudes of shape {list(magnitude.shape)}; expected one for each of its "
            f"{up.shape[0]} output rows"
        )
    for part, tensor in {"lora_A": down, "lora_B": up, "DoRA magnitude": magnitude}.items():
        if tensor is not None and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise AdapterError(f"{path}: {name} has a {part} of {tensor.dtype} that isn't all of finite numbers")
    rank = down.shape[0]
    alpha = parts["alpha"].flatten().tolist() if "alpha" in parts else [rank]
    if rank < 1 or len(alpha) != 1 or isinstance(alpha[0], complex) or not math.isfinite(alpha[0]):
        raise AdapterError(f"{path}: {name} has rank {rank} and alpha {alpha}; expected a number for each")
    return LowRankWeights(
        down.float(),
        up.float(),
        rank,
        float(alpha[0]),
        up.shape[0],
        magnitude=None if magnitude is None else magnitude.float().flatten(),
    )


def magnitude_of(weights: LowRankWeights) -> Tensor:
    """DoRA's magnitudes as PEFT and diffusers have them: of a convolution in the shape of its output's channels."""
    return weights.magnitude.view((-1,) if weights.lora_A.dim() == 2 else (1, -1, 1, 1))


def is_foreign(key: str) -> bool:
    """Whether a key is of a format that is read by diffusers' converters alone; see `vislora.formats.foreign`."""
    return key.startswith(tuple(_FOREIGN))


def whose(key: str) -> str:
    """In whose names a foreign key is."""
    return next(names for start, names in _FOREIGN.items() if key.startswith(start))


def refusal(key: str, path: Path) -> AdapterError:
    """The error for a key that can't be read."""
    what = next((what for part, what in _REFUSED.items() if part in key), None)
    if what is None and is_foreign(key):
        return AdapterError(f"{path}: {key!r}: {whose(key)} can't be read")
    told = f"{what} can't be read" if what else "its meaning isn't known"
    return AdapterError(f"{path}: {key!r}: {told}; it would be lost")


def check_written(adapter: Adapter, path: Path, read: Callable[[Path], Adapter]) -> None:
    """Read a file back; every layer must be there and multiply to the same update. A file that fails is removed.

    Raises:
        AdapterError: it isn't so.
    """
    try:
        _compare(adapter, read(path), path)
    except AdapterError:
        path.unlink()
        raise


def _compare(adapter: Adapter, back: Adapter, path: Path) -> None:
    if back.layers.keys() != adapter.layers.keys():
        odd = sorted(back.layers.keys() ^ adapter.layers.keys())
        raise AdapterError(f"{path}: what was written reads back with other layers: {', '.join(odd[:6])}")
    for name, wanted in adapter.layers.items():
        found = back.layers[name]
        same = torch.equal(found.lora_A, wanted.lora_A.float()) and torch.allclose(
            found.lora_B * found.scale, wanted.lora_B.float() * wanted.scale, rtol=1e-5, atol=0
        )
        magnitudes = [w.magnitude for w in (found, wanted) if w.magnitude is not None]
        if not same or len(magnitudes) == 1 or (magnitudes and not torch.equal(*magnitudes)):
            raise AdapterError(f"{path}: {name} reads back differently; try another disk or file system")
