"""timm models: by name or folder, with weights from the hub, a local file, or the one that ships."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vislora.config.model import ModelConfig
from vislora.data.transforms import Preprocessing
from vislora.errors import AdapterError, ModelError
from vislora.files import naming, sha256, write_json
from vislora.hub import offline_if_unreachable
from vislora.models.timm_keys import check_keys, keys_told_by_timm
from vislora.paths import ASSETS, user_path

EMBEDDED = ASSETS / "vit_birds"
_LOCAL = "local-dir:"
_MISMATCH = re.compile(  # in torch's words
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.+?)\) from checkpoint, the shape in current "
    r"model is torch\.Size\((.+?)\)"
)


def build_vit(config: ModelConfig, num_classes: int) -> nn.Module:
    """A timm model with a fresh head, in eval mode; `untrained_names` are what else is drawn at random.

    Args:
        config: which model and weights. Positional embeddings are resampled to `config.img_size`.
        num_classes: outputs of the head, which is drawn anew (from torch's global generator) unless the weights come
            from a folder whose head has as many.

    Raises:
        ModelError: an unknown name, one without a classifier, a size that patches don't divide, arguments that go
            against other settings, weights that are missing, out of reach, malformed or of another architecture.
    """
    folder = _folder(config.name)
    name = config.name if folder is None else f"{_LOCAL}{folder}"
    arguments = _arguments(config, num_classes)
    given = arguments.get("pretrained_cfg_overlay") or {}
    if not isinstance(given, dict):
        raise ModelError(f"model.args.pretrained_cfg_overlay={given}: expected a table, as {{interpolation: bicubic}}")
    overlay: dict[str, Any] = dict(given)
    if config.img_size is not None:
        overlay["input_size"] = (3, config.img_size, config.img_size)
    if config.weights not in ("pretrained", "random"):
        # without a source: timm would look at the folder's or the hub's own weights in place of the file
        overlay |= {"file": str(_weights_file(config.weights)), "custom_load": False, "source": ""}
    if overlay:
        arguments["pretrained_cfg_overlay"] = overlay
    pretrained = config.weights != "random"
    if folder is not None:
        _check_folder(folder)
    elif not timm.is_model(name) and ":" not in name:
        near = get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(f"timm has no model {name!r}" + (f"; close: {', '.join(near)}" if near else ""))
    elif config.weights == "pretrained":
        offline_if_unreachable()
    try:
        with keys_told_by_timm() as told:
            model = _created(name, pretrained, arguments, resized=config.img_size is not None)
    except FileNotFoundError as error:  # the hub client's own error for a file neither cached nor in reach is one
        raise ModelError(
            f"the weights of {name} are not in the local cache, and the hub can't be reached; "
            "give a file with model.weights=FILE.safetensors, or use model=embedded"
        ) from error
    except SafetensorError as error:
        read = f"the weights of {name}" if config.weights == "pretrained" else f"model.weights={config.weights}"
        raise ModelError(f"{read} can't be read as safetensors: {error}; fetch or save the file again") from error
    except Exception as error:  # timm and the hub client document no common class
        if found := _MISMATCH.search(str(error)):
            key, read, built = found.groups()
            raise ModelError(
                f"model.weights={config.weights} are another model's than {name}'s: {key} is of shape {read} there, "
                f"and {built} in the model; choose the model.name and model.img_size that they belong to"
            ) from None
        first = str(error).strip().splitlines()
        raise ModelError(f"timm can't build {name} with {arguments}: {' '.join(first[:3])}") from error
    head = head_names(model)
    if not head:
        raise ModelError(f"{name} is an encoder of features without a classifier; choose a model that has one")
    if config.img_size is not None:
        _check_size(model, config.img_size)
    source = config.name if config.weights == "pretrained" else config.weights
    model.untrained = check_keys(source, model, name, num_classes, head, told)
    return model.eval()


def preprocessing(model: nn.Module, crop_pct: float | None = None) -> Preprocessing:
    """How the model wants its images, as timm knows it from the model and its weights.

    Raises:
        ModelError: they aren't square, or are prepared in a way that isn't known.
    """
    wanted = resolve_data_config({}, model=model)
    height, width = input_size(model)
    if height != width:
        raise ModelError(
            f"the model takes pictures of {height}x{width}, and only square ones are supported; give model.img_size"
        )
    return Preprocessing(
        size=height,
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation=wanted["interpolation"],
        crop_pct=crop_pct or wanted["crop_pct"],
        crop_mode=wanted["crop_mode"],
    )


def input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width, in pixels, of the pictures that a model was made for."""
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # differs where img_size was given
    height, width = (built_for or resolve_data_config({}, model=model)["input_size"])[-2:]
    return height, width


def head_names(model: nn.Module) -> list[str]:
    """Names of the classifier modules, usually ["head"]; none in an encoder of features."""
    names = model.pretrained_cfg.get("classifier") or ()
    there = dict(model.named_modules())
    return [name for name in ([names] if isinstance(names, str) else names) if name in there]


def untrained_names(model: nn.Module) -> list[str]:
    """Names of what a training begins anew from random numbers: the classifier's modules, and those that the base
    weights' file has nothing of, because settings ask for them (`model.pool=map`); last single parameters of others."""
    return [*head_names(model), *getattr(model, "untrained", ())]


def check_held(model: nn.Module) -> None:
    """Refuse what starts at random and no adapter could hold, as others would draw theirs.

    Raises:
        AdapterError: single parameters do.
    """
    own = {name for name, _ in model.named_parameters()}
    if lost := [name for name in untrained_names(model) if name in own]:
        raise AdapterError(
            f"the base weights lack {lost[0]}, which starts at random, and an adapter holds whole modules alone; train "
            "the whole model (adapter=full) and use it as it is, or leave out the setting of the model that asks for it"
        )


def weights_hash(config: ModelConfig) -> str | None:
    """SHA-256 of the base weights' file; None where they come from the hub (which has its own revisions) or are
    random."""
    if config.weights not in ("pretrained", "random"):
        return sha256(_weights_file(config.weights))
    folder = _folder(config.name)
    return None if folder is None or config.weights == "random" else sha256(folder / "model.safetensors")


def save_vit(model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Write a plain model (nothing adapted) in timm's folder layout: `timm.create_model("local-dir:FOLDER",
    pretrained=True)`.

    `about` goes beside it as vislora.json; its "preprocessing" and "classes" become part of timm's config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    p = Preprocessing.from_dict(about["preprocessing"])
    images = {
        "input_size": (3, p.size, p.size),
        "mean": p.mean,
        "std": p.std,
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "crop_mode": p.crop_mode,
    }
    labels = {"label_names": about["classes"]} if about.get("classes") else None
    own = set(state_dict_once(model))
    # safetensors refuses tensors that share memory
    copying = model.register_state_dict_post_hook(
        lambda _, state, *__: state.update({name: t.clone() for name, t in state.items() if name not in own})
    )
    try:
        with naming(folder):
            timm.models.save_for_hf(model, folder, labels, safe_serialization=True, data_config=images)
    finally:
        copying.remove()
    # safetensors 0.8 lets nobody but the owner read what it writes
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    write_json(about, folder / "vislora.json")


def state_dict_once(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict in which nothing is there by a second name, as CoaT has one MLP in three places."""
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in own}


def _arguments(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """What timm is given besides the name and the weights."""
    given = dict(config.args)
    if given.get("in_chans", 3) != 3:
        raise ModelError(f"model.args.in_chans={given['in_chans']}: pictures have three channels here; leave it out")
    if weights := [key for key in ("pretrained", "checkpoint_path") if key in given]:
        raise ModelError(f"model.args.{weights[0]}={given[weights[0]]}: say by model.weights what is loaded")
    own = {
        "num_classes": ("the number of classes", num_classes),
        "img_size": ("model.img_size", config.img_size),
        "global_pool": ("model.pool", config.pool),
        "drop_path_rate": ("model.drop_path", config.drop_path or None),
    }
    own = {key: setting for key, setting in own.items() if setting[1] is not None}
    for key, (what, value) in own.items():
        if given.get(key, value) != value:
            raise ModelError(f"model.args.{key}={given[key]}, and {what} is {value}; leave it out of model.args")
    return given | {key: value for key, (_, value) in own.items()}


def _created(name: str, pretrained: bool, arguments: dict[str, Any], resized: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        if not resized:  # it is in model.args alone, and would be lost
            raise TypeError("it has no argument img_size; give model.img_size in its place") from error
        # nearly all of these are built the same for pictures of any size, so that it is enough to prepare them in the
        # one wanted; what isn't is refused before it is trained
        arguments = {key: value for key, value in arguments.items() if key != "img_size"}
        return timm.create_model(name, pretrained=pretrained, **arguments)


def _check_size(model: nn.Module, size: int) -> None:
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    patch = embed.patch_size[0]
    if size % patch:  # timm would leave out what is over at the right and at the bottom
        near = " or ".join(str(patch * n) for n in (size // patch, size // patch + 1) if n)
        raise ModelError(
            f"model.img_size={size} isn't a multiple of the model's patches of {patch} pixels; give {near}"
        )


def _folder(name: str) -> Path | None:
    """The folder that a name of a model is of; None of timm's own names."""
    if name == "embedded":
        return EMBEDDED
    return user_path(name.removeprefix(_LOCAL)) if name.startswith(_LOCAL) else None


def _check_folder(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing; a model folder holds config.json and model.safetensors")


def _weights_file(path: str) -> Path:
    file = user_path(path)
    if not file.is_file():
        raise ModelError(f"model.weights={path}: no such file; give pretrained, random or a .safetensors file")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"model.weights={path}: only .safetensors is read, since a {file.suffix or 'pickled'} file can run code; "
            "convert it once where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), …)"
        )
    return file
