"""Models with quantised Linear layers, in the two forms that libraries have: a class, or a weight, of their own."""

from collections.abc import Callable
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn

BLOCK = 32  # numbers that share a scale in Q8_0


def by_class(layer: nn.Linear) -> nn.Linear:
    """diffusers' layer for GGUF files: bytes, [out, in / 32 * 34], which its own forward reads."""
    kind = gguf.GGMLQuantizationType.Q8_0
    made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
    packed = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
    made.weight, made.bias = GGUFParameter(packed, quant_type=kind), layer.bias
    return made.requires_grad_(False).train(layer.training)


class Codes(Tensor):
    """A weight of a float dtype that holds a scale of its own, and can be used in F.linear alone, as torchao's are."""

    @staticmethod
    def of(weight: Tensor) -> "Codes":
        scale = weight.abs().max() / 127
        codes = (weight / scale).round().as_subclass(Codes)
        codes.scale = scale
        return codes

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3] if not kwargs else (*args, kwargs.get("bias"))
            with torch._C.DisableTorchFunctionSubclass():
                return F.linear(x, weight.as_subclass(Tensor) * weight.scale, bias)
        if func.__name__ in ("__get__", "requires_grad_", "is_floating_point", "detach", "__set__"):
            found = super().__torch_function__(func, types, args, kwargs)
            if isinstance(found, Codes):
                found.scale = args[0].scale
            return found
        raise NotImplementedError(f"Codes: {func.__name__}")


def by_weight(layer: nn.Linear) -> nn.Linear:
    """A plain nn.Linear with such a weight."""
    layer.weight = nn.Parameter(Codes.of(layer.weight.detach()), requires_grad=False)
    return layer


KINDS = {"class": by_class, "weight": by_weight}


def quantise(model: nn.Module, kind: str, pick: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """The model with the Linear layers that `pick` likes quantised, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % BLOCK == 0 and pick(name):
            model.set_submodule(name, KINDS[kind](layer))
    return model
