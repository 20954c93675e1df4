"""Adapters in a diffusers pipeline: apply, blend, swap and take out, without PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vislora.errors import AdapterError
from vislora.formats.components import COMPONENTS, named_by_component
from vislora.formats.detect import read_adapter
from vislora.lora import Adapter, Adapters, LowRank
from vislora.lora.algebra import blend
from vislora.models.fitted import fitted

Source = str | Path | Adapter
"""A file or folder that `read_adapter` reads, or an adapter already read."""

# The pipeline's attribute that holds its `Adapters`, so that a copy of a pipeline has a copy of them. No `Applied`: it
# knows the pipeline, and a ring of the two would hold on to a dropped pipeline's memory.
_APPLIED = "_vislora_applied"


def apply(
    pipe: Any, adapter: Source | Sequence[Source], scale: float = 1.0, weights: Sequence[float] | None = None
) -> Applied:
    """Let an adapter, or several at once, act in a diffusers pipeline.

    The pipeline's modules stay the objects they are, and nothing is merged. `enable_model_cpu_offload` may be on.
    Sequential and group offloading give every layer a forward of its own, which hides the adapter: that is refused, and
    while they are on, one that was there before can't be taken out. Don't turn sequential offloading on over an
    adapter: it keeps what a state dict holds, and so loses the matrices, without which the pipeline can't draw. Nor
    layerwise casting, which would store the matrices in as few bits as the weights.
    A component under torch.compile is compiled again when it next runs. `save_pretrained` saves the pipeline without
    the adapter's matrices, and a deep copy of the pipeline has the adapter in it, to be taken out by itself.

    Args:
        pipe: a pipeline of diffusers without an adapter.
        adapter: of any format that `read_adapter` reads. Several are blended exactly, their pairs side by side.
        scale: factor on the low-rank pairs, any finite number; 0 is the base model, 1 as trained. With DoRA the
            magnitudes go from the base's to the trained ones with it, where PEFT has them as trained at any scale, so
            that diffusers draws other pictures of scales other than 1. Modules trained in full and biases, which a
            PEFT folder may hold, act in full at any.
        weights: a factor for each of several adapters; 1 by default.

    Returns:
        what changes the scale, swaps the adapter and takes it out again.

    Raises:
        AdapterError: the adapter can't be read or doesn't fit the pipeline, or there is one already.
    """
    if _at_work(pipe) is not None:
        raise AdapterError("the pipeline has an adapter already; swap it, or unapply it first")
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    models = nn.ModuleDict({name: model for name, model in found.items() if model is not None})
    if held := [name for name, model in models.items() if any(isinstance(part, LowRank) for part in model.modules())]:
        raise AdapterError(
            f"the pipeline's {held[0]} has an adapter already, as where two pipelines share it; take that out first, "
            "by vislora.unapply of the one that it was applied to"
        )
    adapters = Adapters(models)
    applied = Applied(pipe, adapters)
    applied._put(adapter, _number("scale", scale), weights)
    setattr(pipe, _APPLIED, adapters)
    return applied


def unapply(pipe: Any) -> None:
    """Take out what `apply` put in: the pipeline is bit for bit what it was.

    Raises:
        AdapterError: there is nothing to take out, or PEFT has wrapped it meanwhile.
    """
    adapters = _at_work(pipe)
    if adapters is None:
        raise AdapterError(
            "the pipeline has no adapter that apply put in; one that it shared with a copy comes out of both"
        )
    adapters.remove(adapters.active)
    del vars(pipe)[_APPLIED]


class Applied:
    """An adapter at work in a pipeline; made by `apply`, and of no use after `unapply`."""

    def __init__(self, pipe: Any, adapters: Adapters) -> None:
        self._pipe = pipe
        self._adapters = adapters
        self._scale = 1.0

    @property
    def scale(self) -> float:
        """The factor that the adapter acts with; another one can be assigned at any time."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._check_at_work()
        self._set_scale(_number("scale", value))

    @property
    def adapter(self) -> Adapter:
        """What acts, as it was trained, in this pipeline's names."""
        self._check_at_work()
        return self._adapters.adapter(self._adapters.active)

    @property
    def models(self) -> nn.ModuleDict:
        """The pipeline's models that an adapter can act on, by component."""
        return self._adapters.model

    def swap(
        self, adapter: Source | Sequence[Source], scale: float | None = None, weights: Sequence[float] | None = None
    ) -> None:
        """Put another adapter in this one's place, at its scale where none is given. Arguments and errors are those of
        `apply`; after an error the old adapter still acts."""
        self._check_at_work()
        self._put(adapter, self._scale if scale is None else _number("scale", scale), weights)

    def _put(self, adapter: Source | Sequence[Source], scale: float, weights: Sequence[float] | None) -> None:
        kind = type(self._pipe)
        # the layers of a model alone, as PEFT's folders have them, are its denoiser's unless they can't be
        denoiser = next((name for name in ("transformer", "unet") if name in self.models), None)
        fitting = fitted(_read(adapter, weights, kind, denoiser), self.models, kind.__name__)
        old = self._adapters.active
        self._adapters.load("second" if old == "first" else "first", fitting)
        if old is not None:
            self._adapters.remove(old)
        for module in self.models.modules():
            if isinstance(module, LowRank):
                module.register_state_dict_post_hook(_unsaved)
                module.register_load_state_dict_pre_hook(_unloaded)
        self._set_scale(scale)

    def _set_scale(self, scale: float) -> None:
        self._scale = scale
        self._adapters.scale(self._adapters.active, scale)

    def _check_at_work(self) -> None:
        if _at_work(self._pipe) is not self._adapters:
            raise AdapterError("unapply took this adapter out of the pipeline; put one in with vislora.apply")
        for name, model in self.models.items():
            there = getattr(self._pipe, name, None)  # None where it was let go, to save memory
            if there is not None and not (isinstance(there, nn.Module) and any(m is model for m in there.modules())):
                raise AdapterError(
                    f"the pipeline's {name} was replaced after the adapter was applied, and the new one is without it; "
                    "vislora.unapply the pipeline, and apply the adapter again"
                )


def _at_work(pipe: Any) -> Adapters | None:
    """What `apply` put into a pipeline. A shallow copy of the pipeline has the same: once it came out of either, it is
    out of both."""
    adapters = vars(pipe).get(_APPLIED)
    return None if adapters is None or adapters.active is None else adapters


def _read(
    adapter: Source | Sequence[Source], weights: Sequence[float] | None, kind: type, denoiser: str | None
) -> Adapter:
    sources = [adapter] if isinstance(adapter, Source) else list(adapter)
    if not sources:
        raise AdapterError("adapter=[] names no adapter; give one or more")
    if len(sources) == 1 and weights is not None:
        raise AdapterError("weights are for several adapters; give one adapter a scale")
    read = [one if isinstance(one, Adapter) else read_adapter(one, kind) for one in sources]
    adapters = [named_by_component(one, denoiser) for one in read]
    if len(adapters) == 1:
        return adapters[0]
    factors = [1.0] * len(adapters) if weights is None else [_number("weights", weight) for weight in weights]
    return blend(adapters, factors, "cat").adapter


def _number(name: str, value: float) -> float:
    try:
        finite = math.isfinite(value)
    except (TypeError, ValueError):  # the second for a tensor of several
        finite = False
    if not finite:
        raise AdapterError(f"{name}={value!r}: expected a finite number")
    return float(value)


def _unsaved(low: LowRank, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave low-rank pairs out of a state dict: diffusers would open the pipeline saved with them, and not use them."""
    for name, _ in low.named_parameters():
        del state[f"{prefix}{name}"]


def _unloaded(low: LowRank, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let them stay as they are where a state dict, which is without them, is loaded."""
    for name, parameter in low.named_parameters():
        state.setdefault(f"{prefix}{name}", parameter)
