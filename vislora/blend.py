"""python -m vislora.blend adapter=[A,B] weights=[0.7,0.3] out=FOLDER [how=svd|cat|linear] [head=0]

Makes one adapter of several that were trained on the same base model; styles also on others that were tuned from it.
Their heads are not blended: where they differ, head=0 takes the first adapter's, with its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vislora.compose import command
from vislora.config.commands import BlendConfig
from vislora.errors import AdapterError, ConfigError
from vislora.files import free

if TYPE_CHECKING:
    from vislora.lora import Adapter
    from vislora.lora.energy import Computed


def blend(config: BlendConfig) -> Computed:
    """Write the blended adapter into `config.out`: a model's as a PEFT folder, a pipeline's as diffusers' file.

    Raises:
        VisloraError: a mistake in the settings, adapters that don't go together, or a place that is taken.
    """
    from vislora.formats.components import is_pipelines, named_by_component, only_component
    from vislora.formats.detect import read_adapter, save_adapter
    from vislora.lora import algebra
    from vislora.trainings import trainings

    out = free(config.out)
    adapters = [read_adapter(folder) for folder in config.adapter]
    _check_kinds(config.adapter, adapters)
    # two models of a pipeline have no folder of PEFT's together: it would open in either, and half of it be dropped
    if any(map(is_pipelines, adapters)) or len({only_component(adapter.layers) for adapter in adapters}) > 1:
        if config.head is not None:
            raise ConfigError(f"head={config.head}: adapters of pipelines have no heads; leave it out")
        adapters = [named_by_component(adapter) for adapter in adapters]
        _check_denoisers(config.adapter, adapters)
    _check_base(config.adapter, adapters)
    computed = algebra.blend(adapters, config.weights, config.how.value, config.rank, config.head)
    if any(learned := trainings(*(adapter.about for adapter in adapters))):
        adapter = replace(computed.adapter, about=computed.adapter.about | {"trainings": learned})
        computed = replace(computed, adapter=adapter)
    save_adapter(computed.adapter, out)
    return computed


def _check_kinds(files: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that recognise and that draw together."""
    from vislora.formats.components import tell_no_component

    told = [*zip(files, adapters, strict=True)]
    recognise = [file for file, adapter in told if "classes" in adapter.about]
    draw = [file for file, a in told if file not in recognise and not tell_no_component(a.layers)]
    if recognise and draw:
        raise AdapterError(f"{recognise[0]} recognises and {draw[0]} draws; only adapters of one model can be blended")


def _check_denoisers(files: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters of a UNet and of a transformer together: no pipeline has both."""
    of_unets, of_transformers = (
        [file for file, a in zip(files, adapters, strict=True) if any(name.startswith(kind) for name in a.layers)]
        for kind in ("unet.", "transformer")
    )
    if of_unets and of_transformers:
        raise AdapterError(
            f"{of_unets[0]} is for a pipeline with a UNet, {of_transformers[0]} for one with a transformer; only "
            "adapters of one pipeline can be blended"
        )


def _check_base(folders: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Refuse recognisers of which two tell different bases. For pipelines it is told: one base has many names, and
    styles of one are used with another that was tuned from it; files of other programs tell none."""
    told = [(folder, a, base) for folder, a in zip(folders, adapters, strict=True) if (base := _base(a)) is not None]
    for folder, adapter, base in told:
        if base != told[0][2]:
            trained = f"{folder} was trained on {base}, {told[0][0]} on {told[0][2]}"
            if "classes" in adapter.about:
                raise AdapterError(f"{trained}; only one base can be blended")
            print(f"{trained}; blended as adapters of one base")


def _base(adapter: Adapter) -> str | None:
    """The name of the model that an adapter says it was trained on, and its weights' hash where there is one."""
    model, sha256 = adapter.about.get("model"), adapter.about.get("weights_sha256")
    if not isinstance(model, dict):
        return None
    return f"{model.get('name')}" + (f" with weights of SHA-256 {sha256}" if sha256 else "")


def _main(config: BlendConfig, _out: Path) -> None:
    print(blend(config).table())
    print(f"adapter: {config.out}")


if __name__ == "__main__":
    command("blend", _main)
