"""python -m vislora.export adapter=runs/…/adapter out=FOLDER [to=merged|peft|diffusers|kohya]

Writes an adapter in another format; or folds it into its base model and writes plain weights that timm opens:
timm.create_model("local-dir:FOLDER", pretrained=True).
"""

from __future__ import annotations

from pathlib import Path

from vislora.compose import command
from vislora.config.commands import ExportConfig, ExportTo
from vislora.errors import ConfigError
from vislora.files import free
from vislora.paths import user_path


def export(config: ExportConfig) -> Path:
    """Write the adapter, or the merged model, into `config.out`; returns the file or folder.

    Raises:
        VisloraError: a mistake in the settings or the adapter, something that the format can't hold, or a place that is
            taken.
    """
    out = free(config.out)
    if config.to is ExportTo.merged:
        return _merged(config, out)

    from vislora.formats.detect import read_adapter, write_adapter
    from vislora.models.diffusion import class_named

    pipeline = None if config.pipeline is None else class_named(config.pipeline)
    return write_adapter(read_adapter(config.adapter, pipeline), config.to.value, out)


def _merged(config: ExportConfig, out: Path) -> Path:
    from vislora.formats.detect import is_of_a_pipeline
    from vislora.models.vit import save_vit
    from vislora.recognizer import load_recognizer

    if is_of_a_pipeline(user_path(config.adapter)):
        raise ConfigError(
            f"adapter={config.adapter} is of a pipeline, and to=merged writes timm models; choose to=diffusers, "
            "kohya or peft"
        )
    recognizer = load_recognizer(config.adapter, config.weights)
    if recognizer.adapters is None:
        raise ConfigError(f"adapter={config.adapter} is a plain model already; there is nothing to merge")
    recognizer.adapters.merge_and_unload()
    save_vit(recognizer.model, out, recognizer.about)
    return out


def _main(config: ExportConfig, _out: Path) -> None:
    out = export(config)
    if config.to is ExportTo.merged:
        print(f'merged model: {out}; timm.create_model("local-dir:{out}", pretrained=True) opens it')
    else:
        print(f"adapter: {out}")


if __name__ == "__main__":
    command("export", _main)
