"""A trained classifier, opened from what a run or an export left: an adapter folder, or a model folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vislora.config.model import ModelConfig
from vislora.data.cache import weights_key
from vislora.data.images import upright_rgb
from vislora.data.labels import class_name
from vislora.data.order import seeded
from vislora.data.transforms import Preprocessing, eval_transform
from vislora.errors import AdapterError, ConfigError
from vislora.formats.detect import is_of_a_pipeline
from vislora.formats.peft import ABOUT, CONFIG, read_peft
from vislora.lora import Adapters
from vislora.models.vit import build_vit, weights_hash
from vislora.paths import user_path

_OTHER_WEIGHTS = "give the right file with weights=FILE (in vislora.extract: base=FILE)"


@dataclass(frozen=True)
class Recognizer:
    """A model in eval mode with what is needed to use it.

    Attributes:
        model: images [B, 3, size, size] -> logits [B, K].
        preprocessing: what an image goes through first.
        classes: K names.
        about: what the run that trained it noted down.
        adapters: the adapters in the model; None where the whole model was trained or merged.
    """

    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    about: dict[str, Any]
    adapters: Adapters | None = None

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Class probabilities of images, of any mode and turned upright as their EXIF says, float32 [B, K]."""
        transform = eval_transform(self.preprocessing)
        batch = torch.stack([transform(upright_rgb(image)) for image in images])
        return self.model(batch.to(next(self.model.parameters()))).float().softmax(1)


def load_recognizer(folder: Path | str, weights: str | None = None) -> Recognizer:
    """Open an adapter folder (with its base model) or a model folder.

    Args:
        folder: as a run's `adapter/` or `model/`, or as `vislora.export` wrote it.
        weights: the base weights' file, where it has moved since the training.

    Raises:
        AdapterError: not such a folder, or the base weights aren't those the adapter was trained on.
        ModelError: the base model can't be built.
    """
    folder = user_path(folder)
    about = read_about(folder)
    classes = tuple(map(class_name, about["classes"]))
    adapters = None
    if (folder / CONFIG).is_file():
        model, _ = build_base(about, folder, weights)
        adapters = Adapters(model)
        adapters.load("default", read_peft(folder))
    else:
        model = build_vit(ModelConfig(name=f"local-dir:{folder}"), len(classes))
    model.eval().requires_grad_(False)
    return Recognizer(model, Preprocessing.from_dict(about["preprocessing"]), classes, about, adapters)


def check_weights(weights: str | None, folder: Path | str) -> None:
    """Refuse base weights for what has all of its own.

    Raises:
        ConfigError: some are given, and the folder holds a whole model.
    """
    if weights is not None and not (user_path(folder) / CONFIG).is_file():
        raise ConfigError(
            f"weights={weights} are an adapter's base weights, and {folder} is a whole model; leave them out"
        )


def build_base(about: dict[str, Any], where: Path | str, weights: str | None = None) -> tuple[nn.Module, str | None]:
    """The model that a training began with, with a fresh head, and the hash of its weights; random ones are drawn again
    from the training's seed.

    Args:
        about: what the run noted down.
        where: where that is from, for messages.
        weights: the base weights' file, where it has moved since the training.

    Raises:
        AdapterError: the base weights are gone, or aren't those of the training.
        ModelError: it can't be built.
    """
    base, remedy = base_config(about, where, weights), _OTHER_WEIGHTS
    with seeded(about.get("seed", 0)):
        model = build_vit(base, len(about["classes"]))
    found, expected = base_hash(base, model), about.get("weights_sha256")
    if expected is not None and found != expected:
        if about["model"].get("weights") == "random":  # other versions draw others, and other CPUs round otherwise
            remedy = "open it with the torch and timm, and on the kind of CPU, that it was trained with"
        raise AdapterError(
            f"{where} was trained on base weights with SHA-256 {expected[:12]}…, {base.weights} has "
            f"{(found or 'none')[:12]}…; {remedy}"
        )
    return model, found


def base_config(about: dict[str, Any], where: Path | str, weights: str | None = None) -> ModelConfig:
    """The settings that `build_base` builds its model with; so what is missing for it is told before any work.

    Raises:
        AdapterError: the base weights are gone.
    """
    base = ModelConfig(**about["model"])
    base.weights = weights or base.weights
    if base.weights == "random" and about.get("weights_sha256") is None:
        raise AdapterError(f"{where} was trained on random base weights, which are gone with the run; train it again")
    if base.weights not in ("pretrained", "random") and not user_path(base.weights).is_file():
        raise AdapterError(f"{where} needs its base weights, and {base.weights} isn't there; {_OTHER_WEIGHTS}")
    return base


def base_hash(config: ModelConfig, model: nn.Module) -> str | None:
    """SHA-256 of a fresh model's weights: of their file, or where they are random of the tensors; None of the hub's."""
    return weights_key([model]) if config.weights == "random" else weights_hash(config)


def read_about(folder: Path) -> dict[str, Any]:
    """What a run noted down beside its adapter or model.

    Raises:
        AdapterError: there is no such folder, it holds something else, or its vislora.json is missing or malformed.
    """
    path = folder / ABOUT
    if not folder.exists():
        raise AdapterError(f"{folder} isn't there; give a run's adapter/ or model/ folder")
    if not path.is_file():
        if is_of_a_pipeline(folder):
            raise AdapterError(
                f"{folder} is a pipeline's adapter, which recognises nothing; python -m vislora.generate "
                f"adapter={folder} draws with it"
            )
        raise AdapterError(
            f"{path} is missing: it names the base model and the classes. An adapter without it is opened in Python: "
            "Adapters(model).load(name, read_peft(folder))"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        about = {key: about[key] for key in ("model", "preprocessing", "classes", "data")} | about
        unknown = {**about["model"]}.keys() - {field.name for field in fields(ModelConfig)}
        Preprocessing.from_dict(about["preprocessing"])
        tuple(about["classes"])
    except KeyError as error:
        raise AdapterError(
            f"{path} has no {error}, as a recogniser's has; part of a pipeline's adapter, if this is one, is opened "
            "with the whole: vislora.apply(pipe, FOLDER)"
        ) from None
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} is malformed: {error!r}") from None
    if unknown:
        raise AdapterError(
            f"{path}: the model has the unknown key {min(unknown)!r}; take it out, or use the version of vislora that "
            "wrote it"
        )
    return about
