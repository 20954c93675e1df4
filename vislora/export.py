"""python -m vislora.export adapter=runs/…/adapter out=FOLDER

Folds an adapter into its base model and writes plain weights that timm opens:
timm.create_model("local-dir:FOLDER", pretrained=True).
"""

from __future__ import annotations

from pathlib import Path

from vislora.compose import command
from vislora.config import ExportConfig
from vislora.errors import ConfigError


def export(config: ExportConfig) -> Path:
    """Write the merged model into `config.out`; returns that folder.

    Raises:
        VisloraError: a mistake in the settings or the adapter, or a folder that holds a model already.
    """
    from vislora.models.vit import save_vit
    from vislora.recognizer import load_recognizer

    out = Path(config.out)
    if (out / "model.safetensors").exists():
        raise ConfigError(f"out={out} holds a model already; choose another folder")
    recognizer = load_recognizer(config.adapter, config.weights)
    if recognizer.adapters is None:
        raise ConfigError(f"adapter={config.adapter} is a plain model already; there is nothing to merge")
    recognizer.adapters.merge()
    for layer in list(recognizer.adapters.adapter("default").layers):
        del recognizer.model.get_submodule(layer).lora
    save_vit(recognizer.model, out, recognizer.about)
    return out


def _main(config: ExportConfig, _out: Path) -> None:
    out = export(config)
    print(f'merged model: {out}; timm.create_model("local-dir:{out}", pretrained=True) opens it')


if __name__ == "__main__":
    command("export", _main)
