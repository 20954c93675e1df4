"""Put adapters into a model, switch them, merge them, take them out again."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.errors import AdapterError
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.layers import LoraConv2d, LoraLinear, LoraMultiheadAttention, LoraOutProjection, LowRank, Rows
from vislora.lora.reads import frozen_weight

_ADAPTED = {
    nn.Linear: LoraLinear,
    nn.Conv2d: LoraConv2d,
    nn.MultiheadAttention: LoraMultiheadAttention,
    NonDynamicallyQuantizableLinear: LoraOutProjection,
}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


@dataclass(frozen=True)
class TargetLayer:
    """A layer to adapt: its name in the model, and the output rows of each pair (None: one pair over all rows)."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class LoraSettings:
    """How new low-rank pairs are made; see `LowRank`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False


@dataclass
class _Held:
    """One adapter in its live form: low-rank modules and its own copies of the fully trained modules, by name."""

    layers: dict[str, LowRank]
    trained: dict[str, nn.Module]


class Adapters:
    """The named adapters of one model, at most one of them active.

    The base model is frozen while adapters are there. Only the active adapter's parameters are part of the model (and
    of `model.parameters()`); switching moves references, nothing is rebuilt. With none left, the model is what it
    was: the same module objects, classes, parameters and `requires_grad` flags.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._held: dict[str, _Held] = {}
        self._base_modules: dict[str, nn.Module] = {}  # replaced by an adapter's own copies while it is active
        self._base_weights: dict[str, Tensor] = {}  # of merged layers
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        if any(isinstance(module, LowRank) for module in model.modules()):
            raise AdapterError("the model holds adapters already; use the Adapters object that put them there")

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def add(
        self, name: str, targets: Iterable[TargetLayer], settings: LoraSettings, trained: Iterable[str] = ()
    ) -> None:
        """Add an untrained adapter and make it active.

        Args:
            name: a new name.
            targets: the layers to adapt, each an nn.Linear, an ungrouped nn.Conv2d or an nn.MultiheadAttention (its
                fused q, k and v; its `out_proj` is a layer of its own).
            settings: rank, alpha, dropout of all of them.
            trained: names of modules to train in full beside them; the adapter gets its own copies.

        Raises:
            AdapterError: the name is taken, there are no targets or one twice, or a module is missing, of another class
                or part of one that is trained in full.
        """
        layers = {}
        for target in targets:
            if target.name in layers:
                raise AdapterError(f"{target.name} is named twice among the targets")
            weight = frozen_weight(self._adaptable(target.name, settings.dropout))
            layers[target.name] = LowRank(
                weight, settings.rank, settings.alpha, settings.dropout, settings.rslora, target.rows
            )
        self._hold(name, _Held(layers, {path: copy.deepcopy(self._base(path)) for path in trained}))

    def load(self, name: str, adapter: Adapter) -> None:
        """Add a trained adapter and make it active.

        Raises:
            AdapterError: the name is taken, the adapter is empty, or one of its layers doesn't fit the model.
        """
        layers = {path: self._low_rank(path, weights, adapter.dropout) for path, weights in adapter.layers.items()}
        trained = {path: self._trained(path, state) for path, state in adapter.trained.items()}
        self._hold(name, _Held(layers, trained))

    def adapter(self, name: str) -> Adapter:
        """A copy, on the CPU, of an adapter's values as trained, whatever `scale` says."""
        held = self._get(name)
        layers = {}
        for path, low in held.layers.items():
            out = frozen_weight(self._module(path)).shape[0]
            rows = None if low.rows == ((0, out),) else low.rows
            a, b = (matrix.detach().cpu().clone() for matrix in (low.lora_A, low.lora_B))
            layers[path] = LowRankWeights(a, b, low.rank, low.alpha, out, low.rslora, rows)
        trained = {
            path: {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
            for path, module in held.trained.items()
        }
        dropout = max((low.dropout for low in held.layers.values()), default=0.0)
        return Adapter(layers, trained, dropout)

    def activate(self, name: str) -> None:
        """Make one adapter the active one."""
        held = self._get(name)
        self.deactivate()
        self.model.requires_grad_(False)
        for path, low in held.layers.items():
            layer = self._module(path)
            layer.lora = low.to(frozen_weight(layer).device)
            layer.__class__ = _ADAPTED[type(layer)]
        for path, module in held.trained.items():
            base = self._module(path)
            self._base_modules[path] = base
            self._replace(path, module.to(next(base.parameters()).device).train(base.training).requires_grad_(True))
        self.active = name

    def deactivate(self) -> None:
        """Leave the base model alone in place, frozen; adapters stay and can be activated again."""
        if self._base_weights:
            self.unmerge()
        if self.active is None:
            return
        for path in self._held[self.active].layers:
            layer = self._module(path)
            layer.__class__ = _PLAIN[type(layer)]
            del layer.lora
        for path, module in self._base_modules.items():
            self._replace(path, module.train(self._module(path).training))
        self._base_modules.clear()
        self.active = None

    def scale(self, name: str, multiplier: float) -> None:
        """Apply an adapter at another strength: 0 is the base model (with the adapter's head), 1 as trained."""
        if self._base_weights and name == self.active:
            raise AdapterError(f"adapter {name!r} is merged into the weights; unmerge before changing its scale")
        for low in self._get(name).layers.values():
            low.multiplier = multiplier

    def remove(self, name: str) -> None:
        """Take an adapter out; with the last one gone, the model is bit for bit what it was."""
        self._get(name)
        if self.active == name:
            self.deactivate()
        del self._held[name]
        if not self._held:
            for path, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._flags.get(path, parameter.requires_grad))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapter into the frozen weights: W0 + s B A, summed in float32 and rounded once to W0's
        dtype.

        The base weights are kept aside. The model computes without a low-rank path until `unmerge`.
        """
        if self.active is None or self._base_weights:
            raise AdapterError("nothing to merge: no adapter is active" if not self.active else "merged already")
        for path, low in self._held[self.active].layers.items():
            layer = self._module(path)
            weight = frozen_weight(layer)
            self._base_weights[path] = weight.detach().clone()
            weight.copy_(low.merged(weight))
            layer.__class__ = _PLAIN[type(layer)]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: the base weights come back bit for bit, the adapter acts beside them again."""
        if not self._base_weights:
            raise AdapterError("nothing to unmerge")
        for path, weight in self._base_weights.items():
            layer = self._module(path)
            frozen_weight(layer).copy_(weight)
            layer.__class__ = _ADAPTED[type(layer)]
        self._base_weights.clear()

    def _hold(self, name: str, held: _Held) -> None:
        if name in self._held:
            raise AdapterError(f"an adapter named {name!r} is there already; remove it first or choose another name")
        if not held.layers:
            raise AdapterError(f"adapter {name!r} has no layers; name at least one target")
        for path, module in held.trained.items():
            if next(module.parameters(), None) is None:
                raise AdapterError(f"{path} has no parameters to train; a model made with num_classes=0 has no head")
            if inside := [layer for layer in held.layers if f"{layer}.".startswith(f"{path}.")]:
                raise AdapterError(f"{inside[0]} can't be adapted: it is part of {path}, which is trained in full")
        self._held[name] = held
        self.activate(name)

    def _get(self, name: str) -> _Held:
        if name not in self._held:
            raise AdapterError(f"no adapter named {name!r}; there is {', '.join(self._held) or 'none'}")
        return self._held[name]

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"the adapter belongs to another model: {type(self.model).__name__} has no module {path!r}"
            ) from None

    def _base(self, path: str) -> nn.Module:
        """The base model's own module, also while an adapter's copy is in its place."""
        return self._base_modules.get(path) or self._module(path)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def _adaptable(self, path: str, dropout: float = 0.0) -> nn.Module:
        layer = self._module(path)
        plain = _PLAIN.get(type(layer), type(layer))
        if plain not in _ADAPTED:
            raise AdapterError(
                f"{path} is a {type(layer).__name__}; "
                "only nn.Linear, nn.Conv2d and nn.MultiheadAttention can be adapted"
            )
        if plain in (nn.MultiheadAttention, NonDynamicallyQuantizableLinear) and dropout:
            raise AdapterError(
                f"dropout={dropout} can't act on {path}: torch's attention takes the weight as a whole; set it to 0"
            )
        if plain is nn.MultiheadAttention and frozen_weight(layer) is None:
            raise AdapterError(f"{path} has separate weights for q, k and v of different widths; not supported")
        if plain is nn.Conv2d and (
            layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            raise AdapterError(f"{path} is a convolution with groups, padding mode or 'same' padding; not supported")
        return layer

    def _low_rank(self, path: str, weights: LowRankWeights, dropout: float) -> LowRank:
        weight = frozen_weight(self._adaptable(path))
        low = LowRank(weight, weights.rank, weights.alpha, dropout, weights.rslora, weights.rows)
        for key in ("lora_A", "lora_B"):
            mine, theirs = getattr(low, key), getattr(weights, key)
            if mine.shape != theirs.shape:
                raise AdapterError(
                    f"{path}.{key} has shape {list(theirs.shape)}, the model needs {list(mine.shape)}: "
                    "the adapter was trained on another architecture"
                )
            with torch.no_grad():
                mine.copy_(theirs)
        return low

    def _trained(self, path: str, state: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self._base(path))
        if isinstance(module, nn.Linear) and "weight" in state:  # a head may have another number of classes
            out, inner = state["weight"].shape
            if inner == module.in_features and (
                out != module.out_features or (module.bias is None) != ("bias" not in state)
            ):
                module = nn.Linear(inner, out, bias="bias" in state)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise AdapterError(f"the adapter's {path} doesn't fit the model's: {error}") from None
        return module.requires_grad_(True)
