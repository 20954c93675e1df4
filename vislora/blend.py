"""python -m vislora.blend adapter=[runs/A/adapter,runs/B/adapter] weights=[0.7,0.3] out=FOLDER [how=svd|cat|linear]

Makes one adapter of several that were trained on the same base model. Their heads are not blended: where they differ,
head=0 takes the first adapter's, with its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config import BlendConfig
from vislora.errors import AdapterError
from vislora.files import free

if TYPE_CHECKING:
    from vislora.lora import Adapter
    from vislora.lora.energy import Computed


def blend(config: BlendConfig) -> Computed:
    """Write the blended adapter into `config.out`: a model's as a PEFT folder, a pipeline's as diffusers' file.

    Raises:
        VisloraError: a mistake in the settings, adapters that don't go together, or a place that is taken.
    """
    from vislora.formats.components import is_pipelines, named_by_component
    from vislora.formats.detect import read_adapter, save_adapter
    from vislora.lora import algebra

    out = free(config.out)
    adapters = [read_adapter(folder) for folder in config.adapter]
    if any(map(is_pipelines, adapters)):
        adapters = [named_by_component(adapter) for adapter in adapters]
    _check_base(config.adapter, adapters)
    computed = algebra.blend(adapters, config.weights, config.how.value, config.rank, config.head)
    save_adapter(computed.adapter, out)
    return computed


def _check_base(folders: Sequence[str], adapters: Sequence[Adapter]) -> None:
    bases = [(a.about.get("model", {}).get("name"), a.about.get("weights_sha256")) for a in adapters]
    for folder, base in zip(folders, bases, strict=True):
        if base != bases[0]:
            raise AdapterError(
                f"{folder} was trained on {base}, {folders[0]} on {bases[0]}; only one base can be blended"
            )


def _main(config: BlendConfig, _out: Path) -> None:
    print(blend(config).table())
    print(f"adapter: {config.out}")


if __name__ == "__main__":
    command("blend", _main)
