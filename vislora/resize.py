"""python -m vislora.resize adapter=runs/…/adapter out=FOLDER rank=4

Changes the rank of an adapter: the largest singular values of each layer's update, and the energy they keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config.commands import ResizeConfig
from vislora.files import free

if TYPE_CHECKING:
    from vislora.lora.energy import Computed


def resize(config: ResizeConfig) -> Computed:
    """Write the adapter into `config.out`: a model's as a PEFT folder, a pipeline's as diffusers' file.

    Raises:
        VisloraError: a mistake in the settings or the adapter, or a place that is taken.
    """
    from vislora.formats.detect import read_adapter, save_adapter
    from vislora.lora import algebra

    out = free(config.out)
    computed = algebra.resize(read_adapter(config.adapter), config.rank, config.energy)
    save_adapter(computed.adapter, out)
    return computed


def _main(config: ResizeConfig, _out: Path) -> None:
    print(resize(config).table())
    print(f"adapter: {config.out}")


if __name__ == "__main__":
    command("resize", _main)
