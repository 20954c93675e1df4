"""What the weight of an adapted layer is to code that reads it instead of calling the layer: W0 + s B A.

BEiT, EVA, SwinV2 and others compute `F.linear(x, self.qkv.weight, bias)`, and nn.MultiheadAttention never calls its
output projection. An adapter that acts in the layer's forward alone would be dead there, and nothing would tell. So the
attribute itself yields the adapted weight, as an `AdaptedWeight`: handed to `F.linear` it becomes the layer's own fused
step, and in any other use the sum, made once, with its gradient.

The frozen weight stays in the module's parameters under its own name: state dicts, `.to()`, copies and
`named_parameters()` see what they saw before. `frozen_weight` reads it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vislora.errors import AdapterError

# What can be told without making the sum.
_SHAPE_ONLY = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}
_WRITES = {Tensor.data.__get__: ".data", Tensor.data.__set__: ".data", Tensor.__setitem__: "an assignment"}


def frozen_weight(layer: nn.Module) -> nn.Parameter | None:
    """The base model's own weight of a layer, adapted or not: [out, in], [out, in, kh, kw] or, of an
    nn.MultiheadAttention, q, k and v in one [3 * dim, dim]. None where a layer has no such parameter."""
    return layer._parameters.get(_name_of_weight(layer))


def set_frozen_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    """Put another one in its place."""
    layer._parameters[_name_of_weight(layer)] = weight


def is_plain(weight: Tensor) -> bool:
    """Whether these are numbers to compute with, and not codes for them, as where bitsandbytes, torchao, quanto or a
    GGUF file has quantised them."""
    if not weight.is_floating_point():
        return False
    if type(weight) in (nn.Parameter, Tensor) or is_sharded(weight):
        return True
    try:
        weight.detach()[:1] + 0.0
    except Exception:  # whatever its class raises for what it can't do
        return False
    return True


def adapted_weight(layer: nn.Module) -> Tensor:
    """The getter behind `weight` (or `in_proj_weight`) of adapted layers."""
    # Looked up without attribute access: an AttributeError in here would make nn.Module fall back to the frozen weight.
    if torch.compiler.is_compiling():  # a compiler fuses the sum with its use, and traces no tensor subclass
        return summed_weight(layer)
    frozen = frozen_weight(layer)
    if is_sharded(frozen):
        if getattr(
            layer, "_is_fsdp_managed_module", False
        ):  # it looks at its shards; layers compute with whole weights
            return frozen
        raise AdapterError(
            f"the weight of a {type(layer).__name__} is sharded; a model can be by FSDP2's fully_shard alone"
        )
    weight = frozen.detach().as_subclass(AdaptedWeight)
    weight.layer = layer
    return weight


class AdaptedWeight(Tensor):
    """W0 + s B A of a layer, not made before it is used; its storage is W0's."""

    layer: nn.Module

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPE_ONLY:
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.linear and (product := _as_call(*args, **kwargs)) is not None:
            return product
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if func in _WRITES or in_place or isinstance(kwargs.get("out"), cls):
            raise AdapterError(
                f"{_WRITES.get(func, name)} would write to the weight of an adapted layer, which is computed; "
                "take the adapter out, or deactivate it, first"
            )
        args, kwargs = tree_map_only(cls, lambda weight: summed_weight(weight.layer), (args, kwargs))
        return func(*args, **kwargs)


def _name_of_weight(layer: nn.Module) -> str:
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def _as_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """F.linear by the layer's own forward; None where the weight isn't a Linear's, or its own bias would come in."""
    if not isinstance(weight, AdaptedWeight) or not isinstance(weight.layer, nn.Linear):
        return None
    own = weight.layer._parameters["bias"]
    if own is not None and own is not bias:
        return None
    y = weight.layer.forward(input)
    return y if bias is own else y + bias.to(y.dtype)


def summed_weight(layer: nn.Module) -> Tensor:
    """W0 + s B A of an adapted layer, made now, with its gradient."""
    frozen, low = frozen_weight(layer), layer._modules["lora"]
    if low.dropout and layer.training:
        raise AdapterError(
            f"dropout={low.dropout} can't act on a {type(layer).__name__} whose weight is read as a whole, as "
            "torch.compile has it with every weight that is read, and torch.func with all; set it to 0"
        )
    with without_autocast(frozen):
        return low.merged(frozen).to(frozen.dtype)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has but a part of it: a DTensor, which torch may be built without."""
    return hasattr(tensor, "full_tensor")


def transformed() -> bool:
    """Whether torch.func is at work (vmap, jvp, per-sample gradients), under which autograd functions of one's own
    can't run: layers then compute with the sum."""
    return torch._C._are_functorch_transforms_active()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    # In this order because, with caches as cold as between two large products, looking up a device's name takes 20
    # microseconds. The meta device, on which shapes alone are computed, has no autocast, and torch raises if asked.
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    # to enter torch.autocast takes longer than a small product
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
