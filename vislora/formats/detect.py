"""An adapter from any of the formats, told apart by content; and into any of them, by name."""

from pathlib import Path

from vislora.errors import AdapterError, first_three
from vislora.files import check_no_run
from vislora.formats.components import COMPONENTS, as_in_files, is_pipelines, of_models, only_component
from vislora.formats.diffusers import FILE, read_diffusers, write_diffusers
from vislora.formats.foreign import read_foreign
from vislora.formats.kohya import is_kohya, read_kohya, write_kohya
from vislora.formats.peft import ABOUT, CONFIG, TENSORS, check_holdable, read_peft, write_peft
from vislora.formats.single_file import is_foreign, read_tensors
from vislora.lora import Adapter
from vislora.paths import user_path


def read_adapter(path: Path | str, pipeline: type | None = None) -> Adapter:
    """The adapter in a .safetensors file of diffusers' or kohya's format, or in a folder: PEFT's, one of PEFT's for
    each component of a pipeline, or one that holds such a file.

    Args:
        path: of the file or folder.
        pipeline: diffusers' class of the pipeline that it is for; other programs' files for transformers, as Flux and
            Wan are, can't be read without it.

    Raises:
        AdapterError: nothing of the kind is there, or it holds something that would be lost.
    """
    path = user_path(path)
    if path.is_dir():
        return _read_folder(path, pipeline)
    if not path.exists():
        raise AdapterError(f"{path} isn't there; an adapter is a .safetensors file, or a folder that holds one")
    if path.name == TENSORS and (path.parent / CONFIG).is_file():
        return read_peft(path.parent)
    keys = list(read_tensors(path)[0])
    if any(is_foreign(key) for key in keys):
        return read_foreign(path, pipeline)
    if any(is_kohya(key) for key in keys):
        return read_kohya(path)
    if any(key.startswith("base_model.model.") for key in keys):
        raise AdapterError(f"{path} is part of a PEFT folder, and {CONFIG} isn't beside it: it holds the scales")
    return read_diffusers(path)


def is_of_a_pipeline(path: Path) -> bool:
    """Whether what is there is a pipeline's adapter, or that of a model that only pipelines have, as a UNet; and not
    another model's, or a whole model (timm's layout).

    Raises:
        AdapterError: it is a run's folder, or a folder of PEFT's that can't be read.
    """
    folder = path.parent if path.name == TENSORS else path
    if (folder / CONFIG).is_file():
        return only_component(read_peft(folder).layers) is not None
    if path.is_file():
        return True
    check_no_run(path)
    if any((path / name).is_file() for name in (ABOUT, "config.json")):
        return False
    return any(path.glob("*.safetensors")) or any(path.glob(f"*/{CONFIG}"))


def write_adapter(adapter: Adapter, to: str, path: Path) -> Path:
    """Write an adapter in a format: `to` is diffusers, kohya or peft. A pipeline's goes in any, as PEFT folders one for
    each component, since PEFT opens models; a single model's as a PEFT folder.

    Returns:
        the file or folder.

    Raises:
        AdapterError: the format can't hold the adapter, the folder holds parts of another one, or a folder has the
            name of a file.
    """
    if to == "diffusers":
        return write_diffusers(adapter, path)
    if to == "kohya":
        return write_kohya(adapter, path)
    if path.suffix == ".safetensors":
        raise AdapterError(f"{path} has the name of a file; PEFT's format is a folder, {path.with_suffix('')}")
    if not is_pipelines(adapter):
        write_peft(adapter, path)
        return path
    parts = of_models(as_in_files(adapter))
    if others := [old.parent.name for old in path.glob(f"*/{CONFIG}") if old.parent.name not in parts]:
        raise AdapterError(f"{path} holds {', '.join(others)} of another adapter; choose another folder")
    for part in parts.values():  # all of them, before the first is written
        check_holdable(part)
    for component, part in parts.items():
        write_peft(part, path / component)
    return path


def save_adapter(adapter: Adapter, path: Path) -> Path:
    """Write an adapter as it is used here: a model's as a PEFT folder, a pipeline's as diffusers' file.

    Returns:
        the file or folder.

    Raises:
        AdapterError: the format can't hold the adapter.
    """
    return write_adapter(adapter, "diffusers" if is_pipelines(adapter) else "peft", path)


def _read_folder(folder: Path, pipeline: type | None) -> Adapter:
    if (folder / CONFIG).is_file():
        return read_peft(folder)
    if (folder / FILE).is_file():
        return read_adapter(folder / FILE, pipeline)
    check_no_run(folder)
    if all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise AdapterError(
            f"{folder} is a whole model; python -m vislora.extract tuned={folder} rank=16 out=FOLDER makes an adapter "
            "of what was trained"
        )
    folders = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if other := [part.name for part in folders if part.name not in COMPONENTS]:
        raise AdapterError(
            f"{folder} holds adapters in folders that are called by no component of a pipeline "
            f"({first_three(other)}); give one of them"
        )
    if parts := {part.name: read_peft(part) for part in folders}:
        layers = {f"{name}.{layer}": w for name, part in parts.items() for layer, w in part.layers.items()}
        trained = {f"{name}.{module}": state for name, part in parts.items() for module, state in part.trained.items()}
        biases = {f"{name}.{bias}": value for name, part in parts.items() for bias, value in part.biases.items()}
        dropout = max(part.dropout for part in parts.values())
        return Adapter(layers, trained, dropout, next(iter(parts.values())).about, biases)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_adapter(files[0], pipeline)
    found = f"{len(files)} .safetensors files; name one" if files else "none of the files of an adapter"
    raise AdapterError(f"{folder} holds {found} ({CONFIG} with {TENSORS}, or {FILE})")
