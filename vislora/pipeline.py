"""Adapters in a diffusers pipeline: apply, blend, swap and take out, without PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.formats.components import COMPONENTS, named_by_component
from vislora.formats.detect import read_adapter
from vislora.lora import Adapter, Adapters, LowRank, LowRankWeights, frozen_weight
from vislora.lora.algebra import blend
from vislora.targets.diffusers import FUSED, is_fused

Source = str | Path | Adapter
"""A file or folder that `read_adapter` reads, or an adapter already read."""

_APPLIED = "_vislora_applied"  # the pipeline's attribute, so that a copy of a pipeline has a copy of what is applied


def apply(
    pipe: Any, adapter: Source | Sequence[Source], scale: float = 1.0, weights: Sequence[float] | None = None
) -> Applied:
    """Let an adapter, or several at once, act in a diffusers pipeline.

    The pipeline's modules stay the objects they are, and nothing is merged. `enable_model_cpu_offload` may be on.
    Sequential and group offloading give every layer a forward of its own, which hides the adapter: that is refused.
    A component under torch.compile is compiled again when it next runs. `save_pretrained` saves the pipeline without
    the adapter's matrices, and a deep copy of the pipeline has the adapter in it, to be taken out by itself.

    Args:
        pipe: a pipeline of diffusers without an adapter.
        adapter: of any format that `read_adapter` reads. Several are blended exactly, their pairs side by side.
        scale: factor on the whole, any finite number; 0 is the base model, 1 as trained.
        weights: a factor for each of several adapters; 1 by default.

    Returns:
        what changes the scale, swaps the adapter and takes it out again.

    Raises:
        AdapterError: the adapter can't be read or doesn't fit the pipeline, or there is one already.
    """
    if _APPLIED in vars(pipe):
        raise AdapterError("the pipeline has an adapter already; swap it, or unapply it first")
    applied = Applied(pipe)
    applied.swap(adapter, scale, weights)
    setattr(pipe, _APPLIED, applied)
    return applied


def unapply(pipe: Any) -> None:
    """Take out what `apply` put in: the pipeline is bit for bit what it was.

    Raises:
        AdapterError: there is nothing to take out.
    """
    if _APPLIED not in vars(pipe):
        raise AdapterError("the pipeline has no adapter that apply put in")
    vars(pipe).pop(_APPLIED)._clear()


class Applied:
    """An adapter at work in a pipeline; made by `apply`, and of no use after `unapply`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = type(pipe).__name__
        found = {name: getattr(pipe, name, None) for name in COMPONENTS}
        self._models = nn.ModuleDict({name: model for name, model in found.items() if model is not None})
        self._adapters = Adapters(self._models)
        self._scale = 1.0
        self._taken_out = False

    @property
    def scale(self) -> float:
        """The factor that the adapter acts with; another one can be assigned at any time."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._check_at_work()
        self._scale = _number("scale", value)
        self._adapters.scale(self._adapters.active, self._scale)

    @property
    def adapter(self) -> Adapter:
        """What acts, as it was trained, in this pipeline's names."""
        self._check_at_work()
        return self._adapters.adapter(self._adapters.active)

    @property
    def models(self) -> nn.ModuleDict:
        """The pipeline's models that an adapter can act on, by component."""
        return self._models

    def swap(
        self, adapter: Source | Sequence[Source], scale: float | None = None, weights: Sequence[float] | None = None
    ) -> None:
        """Put another adapter in this one's place, at its scale where none is given. Arguments and errors are those of
        `apply`; after an error the old adapter still acts."""
        self._check_at_work()
        scale = self._scale if scale is None else _number("scale", scale)
        fitting = self._fitted(_read(adapter, weights))
        old = self._adapters.active
        self._adapters.load("second" if old == "first" else "first", fitting)
        if old is not None:
            self._adapters.remove(old)
        for module in self._models.modules():
            if isinstance(module, LowRank):
                module.register_state_dict_post_hook(_unsaved)
        self.scale = scale

    def _clear(self) -> None:
        self._check_at_work()
        self._adapters.remove(self._adapters.active)
        self._taken_out = True

    def _check_at_work(self) -> None:
        if self._taken_out:
            raise AdapterError("unapply took this adapter out of the pipeline; put one in with vislora.apply")

    def _fitted(self, adapter: Adapter) -> Adapter:
        """The adapter in the names and shapes of this pipeline."""
        layers = {}
        for name, weights in adapter.layers.items():
            here = self._name(name)
            layers[here] = _shaped(weights, frozen_weight(_reachable(self._models, here)))
        trained = {self._name(name): state for name, state in adapter.trained.items()}
        biases = {self._name(name): bias for name, bias in adapter.biases.items()}
        return replace(adapter, layers=layers, trained=trained, biases=biases)

    def _name(self, name: str) -> str:
        component, _, module = name.partition(".")
        if component not in self._models:
            raise AdapterError(f"the adapter has layers for {component}, which {self._pipe} doesn't have")
        if component.startswith("text_encoder"):  # transformers 5.6 took CLIP's level text_model away
            has_level = hasattr(self._models[component], "text_model")
            if module.startswith("text_model.") and not has_level:
                module = module.removeprefix("text_model.")
            elif module.startswith("encoder.layers.") and has_level:
                module = f"text_model.{module}"
        return f"{component}.{module}"


def _read(adapter: Source | Sequence[Source], weights: Sequence[float] | None) -> Adapter:
    sources = [adapter] if isinstance(adapter, Source) else list(adapter)
    if not sources:
        raise AdapterError("adapter=[] names no adapter; give one or more")
    if len(sources) == 1 and weights is not None:
        raise AdapterError("weights are for several adapters; give one adapter a scale")
    adapters = [named_by_component(one if isinstance(one, Adapter) else read_adapter(one)) for one in sources]
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
    for name, _ in chain(low.named_parameters(), low.named_buffers()):
        del state[f"{prefix}{name}"]


def _reachable(models: nn.Module, name: str) -> nn.Module:
    """The layer to adapt, where its module will be called."""
    parent, _, last = name.rpartition(".")
    try:
        owner = models.get_submodule(parent)
        layer = owner.get_submodule(last)
    except AttributeError:
        raise AdapterError(f"the adapter belongs to another model: this pipeline has no module {name}") from None
    if is_fused(owner) and any(last in parts for layer, parts in FUSED.items() if hasattr(owner, layer)):
        raise AdapterError(f"{name} isn't used while projections are fused; call unfuse_qkv_projections() first")
    if hasattr(layer, "base_layer"):
        raise AdapterError(f"{name} is wrapped by PEFT; call pipe.unload_lora_weights() first")
    if "forward" in vars(layer):
        raise AdapterError(
            f"{name} has a forward of its own, as sequential and group offloading give it, which would hide the "
            "adapter; apply it without them, or with enable_model_cpu_offload"
        )
    return layer


def _shaped(weights: LowRankWeights, weight: Tensor | None) -> LowRankWeights:
    """The same matrices for a Linear where the file has them for a 1x1 convolution, and the other way round."""
    if weight is None:  # no layer to adapt, as `load` tells
        return weights
    a, b, dims = weights.lora_A, weights.lora_B, weight.dim()
    if a.dim() == dims or a[0].numel() != a.shape[1]:
        return weights
    ones = (1,) * (dims - 2)
    return replace(weights, lora_A=a.reshape(*a.shape[:2], *ones), lora_B=b.reshape(*b.shape[:2], *ones))
