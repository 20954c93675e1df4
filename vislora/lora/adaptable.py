"""Which layers can be adapted, and the classes that they have meanwhile."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.errors import AdapterError
from vislora.lora.dora import DoraConv2d, DoraLinear, DoraOutProjection
from vislora.lora.layers import LoraConv2d, LoraLinear, LoraMultiheadAttention, LoraOutProjection, opaque_class
from vislora.lora.names import module_named
from vislora.lora.reads import frozen_weight, is_plain

_ADAPTED = {
    nn.Linear: LoraLinear,
    nn.Conv2d: LoraConv2d,
    nn.MultiheadAttention: LoraMultiheadAttention,
    NonDynamicallyQuantizableLinear: LoraOutProjection,
}
_ADAPTED_DORA = {
    nn.Linear: DoraLinear,
    nn.Conv2d: DoraConv2d,
    nn.MultiheadAttention: LoraMultiheadAttention,
    NonDynamicallyQuantizableLinear: DoraOutProjection,
}
_PLAIN = {adapted: plain for kind in (_ADAPTED, _ADAPTED_DORA) for plain, adapted in kind.items()}


def adaptable(model: nn.Module, path: str, dropout: float = 0.0) -> nn.Module:
    """The layer of this name, adapted or not.

    Raises:
        AdapterError: there is none, or it can't be adapted (with this dropout).
    """
    layer = module_named(model, path)
    plain = _plain_class(layer)
    if plain not in _ADAPTED and not is_opaque(layer):
        raise AdapterError(
            f"{path} is a {type(layer).__name__}; only nn.Linear, nn.Conv2d and nn.MultiheadAttention can be adapted"
        )
    if plain is nn.MultiheadAttention and frozen_weight(layer) is None:
        raise AdapterError(f"{path} has separate weights for q, k and v of different widths; not supported")
    check_exchangeable(layer, path)
    if plain in (nn.MultiheadAttention, NonDynamicallyQuantizableLinear) and dropout:
        raise AdapterError(
            f"dropout={dropout} can't act on {path}: torch's attention takes the weight as a whole; set it to 0"
        )
    if plain is nn.Conv2d and (reason := unlike_a_product(layer)):
        raise AdapterError(f"{path} can't be adapted: {reason}")
    return layer


def is_opaque(layer: nn.Module) -> bool:
    """Whether a layer, adapted or not, is a Linear whose product is its own affair: of a class with a forward of its
    own, or with a quantised weight. An adapter acts beside it, and can neither be merged nor look at the weight."""
    plain, weight = _plain_class(layer), frozen_weight(layer)
    if not issubclass(plain, nn.Linear) or weight is None:
        return False
    return plain.forward is not nn.Linear.forward or not is_plain(weight)


def told(layer: nn.Module) -> str:
    """What an opaque layer is, for messages."""
    return f"a {_plain_class(layer).__name__} whose weight is a {type(frozen_weight(layer)).__name__}"


def form_of(layer: nn.Module) -> Tensor | None:
    """The frozen weight, or where that is opaque zeros of its shape [out, in], on its device, without storage of their
    own."""
    weight = frozen_weight(layer)
    if not is_opaque(layer):
        return weight
    return torch.zeros((), device=weight.device).expand(layer.out_features, layer.in_features)


def unadaptable(model: nn.Module) -> list[str]:
    """Names of the modules, layers and others, that can't be adapted."""
    names = []
    for path, _ in model.named_modules():
        try:
            adaptable(model, path)
        except AdapterError:
            names.append(path)
    return names


def unadapted(model: nn.Module, path: str) -> nn.Module:
    """The layer of this name, for an adapter to be put in.

    Raises:
        AdapterError: there is none, it has another adapter, or is of a class that can't be adapted.
    """
    layer = module_named(model, path)
    if is_adapted(layer):
        raise AdapterError(f"{path} is adapted already, by another Adapters object")
    if type(layer) not in _ADAPTED and not is_opaque(layer):
        raise AdapterError(f"{path} has become a {type(layer).__name__}, which can't be adapted")
    check_exchangeable(layer, path)
    return layer


def check_exchangeable(layer: nn.Module, path: str) -> None:
    """Refuse a layer whose class can't be exchanged, because it computes with a forward or a weight of its own.

    Raises:
        AdapterError: it does.
    """
    own = vars(layer).get("forward")
    if getattr(own, "__func__", None) is type(layer).forward:  # a hook that was taken off leaves the class's there
        del layer.forward
    elif own is not None:
        raise AdapterError(
            f"{path} has a forward of its own, as sequential and group offloading and layerwise casting give it; it "
            "would hide an adapter, and go on with one that is merged or taken out. Take these hooks off first; "
            "enable_model_cpu_offload may be on"
        )
    if frozen_weight(layer) is None:
        raise AdapterError(f"{path} computes its weight (weight_norm, pruning); take that out of it first")


def is_adapted(layer: nn.Module) -> bool:
    """Whether a layer computes with its `lora`."""
    return type(layer) in _PLAIN


def carries(layer: nn.Module, low: nn.Module) -> bool:
    """Whether a layer has these pairs, at work or merged."""
    return layer._modules.get("lora") is low


def is_known(layer: nn.Module) -> bool:
    """Whether a layer's class, adapted or plain, is one that can be exchanged for the other."""
    return is_adapted(layer) or type(layer) in _ADAPTED


def is_wrapped(there: nn.Module, part: nn.Module) -> bool:
    """Whether a module is another one, or only wraps it, as for checkpointing or compiling."""
    parameters = [*map(id, there.parameters())] == [*map(id, part.parameters())]
    return there is part or (parameters and any(module is part for module in there.modules()))


def adapt(layer: nn.Module) -> None:
    """Let a layer compute with its `lora`."""
    if is_opaque(layer):
        layer.__class__ = _opaque(type(layer))
    else:
        kinds = _ADAPTED if layer.lora.magnitude is None else _ADAPTED_DORA
        layer.__class__ = kinds[type(layer)]


def restore_class(layer: nn.Module) -> None:
    """Let it compute without."""
    layer.__class__ = _PLAIN[type(layer)]


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return _PLAIN.get(type(layer), type(layer))


@cache
def _opaque(plain: type[nn.Linear]) -> type[nn.Linear]:
    """Made when such a class is first met: other libraries have their own."""
    adapted = opaque_class(plain)
    _PLAIN[adapted] = plain
    return adapted


def unlike_a_product(layer: nn.Conv2d) -> str | None:
    """Why a convolution's update can't be written as an A of its own geometry and a 1x1 B, or not in a file."""
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups, of which each sees its own channels, while A sees all"
    if tuple(layer.dilation) != (1, 1):
        return f"a convolution with dilation={layer.dilation}, whose A PEFT and its kin compute without dilation"
    if layer.padding_mode != "zeros":
        return f"a convolution with padding_mode={layer.padding_mode!r}; only zeros are supported"
    if layer.padding == "same" and any((k - 1) % 2 for k in layer.kernel_size):
        return f"a convolution with padding='same' and a kernel of {layer.kernel_size}, padded more on one side"
    return None
