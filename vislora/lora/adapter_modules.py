"""One adapter in its live form: made new or from a file's values, and turned into values again."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError, first_three
from vislora.lora.adaptable import adaptable, form_of, is_opaque, told, unadapted
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.low_rank import LowRank, alpha_at
from vislora.lora.names import fits, inside, module_named, parameter_named
from vislora.lora.reads import frozen_weight, is_plain, is_sharded
from vislora.lora.settings import LoraSettings, TargetLayer

_BIASES = ("bias", "in_proj_bias")  # the second of an nn.MultiheadAttention's q, k and v
_APART = ("q_bias", "v_bias")  # of a fused qkv without one, in BEiT, EVA and SwinV2


@dataclass
class AdapterModules:
    """Low-rank modules, and the adapter's own copies of the fully trained modules and of biases; all by their names in
    the model. `about` is as in `Adapter`."""

    layers: dict[str, LowRank]
    trained: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]
    dtype: torch.dtype | None = None  # of the frozen weights when the adapter was last in its place
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(
        cls, model: nn.Module, targets: Iterable[TargetLayer | str], settings: LoraSettings, trained: Iterable[str]
    ) -> "AdapterModules":
        """An untrained adapter; see `Adapters.add`."""
        for what, given in (("targets", targets), ("trained", trained)):
            if isinstance(given, str):  # whose letters would be looked for
                raise AdapterError(f"{what}={given!r}: expected names in a list, [{given!r}]")
        layers: dict[str, LowRank] = {}
        for target in (TargetLayer(one) if isinstance(one, str) else one for one in targets):
            if target.name in layers:
                raise AdapterError(f"{target.name} is named twice among the targets")
            numbers = settings.dora or settings.pissa
            weight = _weight(model, target.name, numbers, settings.dropout)
            layers[target.name] = settings.low_rank(target, weight)
        for patterns in (settings.rank_pattern, settings.alpha_pattern):
            _check_patterns(list(patterns), list(layers))
        copies = {path: _copied(model, path) for path in trained}
        return cls(layers, copies, _biases(model, settings.bias, layers, copies))

    @classmethod
    def of(cls, model: nn.Module, adapter: Adapter) -> "AdapterModules":
        """A trained adapter; see `Adapters.load`."""
        return cls(
            {path: _low_rank(model, path, weights, adapter.dropout) for path, weights in adapter.layers.items()},
            {path: _trained(model, path, state) for path, state in adapter.trained.items()},
            {path: _bias(model, path, value) for path, value in adapter.biases.items()},
            about=copy.deepcopy(adapter.about),
        )

    def values(self, weights: Mapping[str, Tensor]) -> Adapter:
        """A copy of what was trained, on the CPU; `weights` are the base model's, by layer."""
        layers = {}
        for path, low in self.layers.items():
            weight = weights[path]
            out = weight.shape[0]
            rows = None if low.rows == ((0, out),) else low.rows
            a, b = low.with_start(_value(low.lora_A), _value(low.lora_B))
            rank = b.shape[1]  # PiSSA's start doubles it
            alpha = alpha_at(rank, low.alpha, low.rank, low.rslora)
            magnitude = None if low.magnitude is None else _value(low.all_magnitudes(weight))
            layers[path] = LowRankWeights(a, b, rank, alpha, out, low.rslora, rows, magnitude)
        trained = {
            path: {key: _value(value) for key, value in module.state_dict().items()}
            for path, module in self.trained.items()
        }
        biases = {path: _value(bias) for path, bias in self.biases.items()}
        dropout = max((low.dropout for low in self.layers.values()), default=0.0)
        return Adapter(layers, trained, dropout, copy.deepcopy(self.about), biases)

    def follow(self, model: nn.Module) -> None:
        """Take what was set aside to where the model has gone meanwhile: its device, and copies to its dtype. That it
        was converted is told by a frozen weight: what is trained may have a dtype of its own."""
        weights = {path: frozen_weight(module_named(model, path)) for path in self.layers}
        for path, low in self.layers.items():
            if low.lora_A.device != weights[path].device:
                low.to(weights[path].device)
        one = next(iter(weights.values()))
        before, now = self.dtype or one.dtype, one.dtype
        for path, module in self.trained.items():  # as `model.to(…)` would have taken it
            there = next(module_named(model, path).parameters(), one)  # a head may have been taken off
            module.to(there.device, None if before == now else now)
        for path, bias in self.biases.items():
            bias.data = bias.data.to(parameter_named(model, path).device, bias.dtype if before == now else now)
        self.dtype = now

    def check(self, model: nn.Module) -> None:
        """Refuse to be put into the model.

        Raises:
            AdapterError: a layer has an adapter of another `Adapters` object, two parts are one in the model, or a part
                has nothing to train.
        """
        for path in self.layers:
            unadapted(model, path)
        for path, module in self.trained.items():
            if next(module.parameters(), None) is None:
                raise AdapterError(f"{path} has no parameters to train; a model made with num_classes=0 has no head")
            others = [*self.layers, *self.biases, *(one for one in self.trained if one != path)]
            if parts := [one for one in others if inside(one, path)]:
                raise AdapterError(f"{parts[0]} is part of {path}, which is trained in full; leave one of them out")
        named: dict[nn.Module, str] = {}
        for path in self.layers:
            if (first := named.setdefault(module_named(model, path), path)) != path:
                raise AdapterError(f"{first} and {path} are one module; name it once")


def chosen_biases(
    model: nn.Module, wanted: str, layers: Iterable[str], trained: Collection[str]
) -> dict[str, nn.Parameter]:
    """The biases that `LoraSettings.bias` means, by name; those of modules trained in full are trained with them.

    Raises:
        AdapterError: there are none, and some are wanted.
    """
    if wanted == "none":
        return {}
    adapted = {f"{path}.{key}" for path in layers for key in _BIASES}
    found = {
        path: bias
        for path, bias in model.named_parameters()
        if path.rpartition(".")[2] in (*_BIASES, *_APART)
        and not any(inside(path, module) for module in trained)
        and (wanted == "all" or path in adapted)
    }
    if not found:
        besides = f" outside of {first_three([*trained])}, trained in full" if wanted == "all" and trained else ""
        raise AdapterError(f"bias={wanted}: none of the layers concerned has a bias{besides}; set it to none")
    return found


def _check_patterns(patterns: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse a pattern that no layer goes by: it fits none, or none that those before it don't fit."""
    fitting = {path: [pattern for pattern in patterns if fits(pattern, path)] for path in layers}
    for pattern in patterns:
        of_it = [found for found in fitting.values() if pattern in found]
        if not of_it:
            raise AdapterError(
                f"the rank or alpha pattern {pattern!r} fits none of the {len(layers)} adapted layers: "
                f"{', '.join(layers[:4])}, …"
            )
        if all(found[0] != pattern for found in of_it):
            raise AdapterError(
                f"the rank or alpha pattern {pattern!r} is without effect: {of_it[0][0]!r} comes before it and fits "
                "its layers too, and the first one counts; put it first"
            )


def _value(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach().cpu().clone()


def _copied(model: nn.Module, path: str) -> nn.Module:
    """A copy of a module to train in full, which shares the module's hooks, those to come too: they belong to the place
    in the model, and what they call is the user's."""
    module = module_named(model, path)
    if codes := [name for name, parameter in module.named_parameters(path) if not is_plain(parameter)]:
        raise AdapterError(f"{codes[0]} is quantised, and {path} can't be trained in full with it; leave {path} out")
    hooks = [value for part in module.modules() for key, value in vars(part).items() if "_hooks" in key]
    return copy.deepcopy(module, {id(value): value for value in hooks})


def _biases(model: nn.Module, wanted: str, layers: Iterable[str], trained: Collection[str]) -> dict[str, nn.Parameter]:
    """Copies of the biases to train, by name."""
    found = chosen_biases(model, wanted, layers, trained)
    return {path: nn.Parameter(bias.detach().clone()) for path, bias in found.items()}


def _bias(model: nn.Module, path: str, value: Tensor) -> nn.Parameter:
    base = parameter_named(model, path)
    if base.shape != value.shape:
        raise AdapterError(f"{path} has shape {list(value.shape)}, the model needs {list(base.shape)}")
    return nn.Parameter(value.to(base.dtype, copy=True))


def _weight(model: nn.Module, path: str, numbers: bool, dropout: float = 0.0) -> Tensor:
    """The frozen weight of a layer to adapt; where it is opaque, what stands for it, unless its numbers are needed."""
    layer = adaptable(model, path, dropout)
    if numbers and is_opaque(layer):
        raise AdapterError(
            f"DoRA and PiSSA need a weight's numbers, and {path} is {told(layer)}; use a plain LoRA, or a model that "
            "isn't quantised"
        )
    return form_of(layer)


def _low_rank(model: nn.Module, path: str, weights: LowRankWeights, dropout: float) -> LowRank:
    dora = weights.magnitude is not None
    weight = _weight(model, path, numbers=dora)
    if weight.is_meta:
        raise AdapterError(f"{path} is on the meta device, where an adapter loses its numbers; give it weights first")
    like = torch.empty_like(weight, device="meta")  # its shape counts; no pairs are drawn in vain
    low = LowRank(like, weights.rank, weights.alpha, dropout, weights.rslora, weights.rows, dora)
    for key in ("lora_A", "lora_B"):
        mine, theirs = getattr(low, key), getattr(weights, key)
        if mine.shape != theirs.shape:
            raise AdapterError(
                f"{path}.{key} has shape {list(theirs.shape)}, the model needs {list(mine.shape)}: "
                "the adapter was trained on another architecture"
            )
        setattr(low, key, nn.Parameter(theirs.to(weight.device, mine.dtype, copy=True)))
    if dora:
        own = torch.cat([weights.magnitude[start:stop] for start, stop in low.rows])
        low.magnitude = nn.Parameter(own.to(weight.device, low.magnitude.dtype))
    return low


def _trained(model: nn.Module, path: str, state: dict[str, Tensor]) -> nn.Module:
    module = _copied(model, path)
    # a head may have another number of classes
    if isinstance(module, nn.Linear) and "weight" in state and state["weight"].dim() == 2:
        out, inner = state["weight"].shape
        if inner == module.in_features and (
            out != module.out_features or (module.bias is None) != ("bias" not in state)
        ):
            like = {"device": module.weight.device, "dtype": module.weight.dtype}
            module = nn.Linear(inner, out, bias="bias" in state, **like)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise AdapterError(f"the adapter's {path} doesn't fit the model's: {error}") from None
    return module
