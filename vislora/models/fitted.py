"""A pipeline's adapter in the names and shapes that the models at hand have."""

from dataclasses import replace

from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapter, LowRankWeights, frozen_weight
from vislora.lora.names import submodule
from vislora.targets.diffusers import FUSED, is_fused


def fitted(adapter: Adapter, models: nn.Module, what: str) -> Adapter:
    """The same adapter for `models`, in which every layer that it names will be called.

    Args:
        adapter: in the names of files; see `vislora.formats.components.named_by_component`.
        models: its children are named as a pipeline's components.
        what: the pipeline's class, for messages.

    Raises:
        AdapterError: it has layers for a component or a module that isn't there, or that isn't called.
    """
    layers = {}
    for name, weights in adapter.layers.items():
        here = _name(name, models, what)
        layers[here] = _shaped(weights, frozen_weight(_reachable(models, here)))
    trained = {_name(name, models, what): state for name, state in adapter.trained.items()}
    biases = {_name(name, models, what): bias for name, bias in adapter.biases.items()}
    return replace(adapter, layers=layers, trained=trained, biases=biases)


def _name(name: str, models: nn.Module, what: str) -> str:
    component, _, module = name.partition(".")
    model = submodule(models, component)
    if model is None:
        raise AdapterError(f"the adapter has layers for {component}, which {what} doesn't have")
    if component.startswith("text_encoder") and not hasattr(model, "text_model"):
        module = module.removeprefix("text_model.")  # a level that transformers 5.6 took away
    return f"{component}.{module}"


def _reachable(models: nn.Module, name: str) -> nn.Module:
    """The layer to adapt, where its module will be called."""
    parent, _, last = name.rpartition(".")
    owner, layer = submodule(models, parent), submodule(models, name)
    if layer is None:
        raise AdapterError(f"the adapter belongs to another model: this pipeline has no module {name}")
    if is_fused(owner) and any(last in parts for layer, parts in FUSED.items() if hasattr(owner, layer)):
        raise AdapterError(f"{name} isn't used while projections are fused; call unfuse_qkv_projections() first")
    if hasattr(layer, "base_layer"):
        raise AdapterError(f"{name} is wrapped by PEFT; call pipe.unload_lora_weights() first")
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
