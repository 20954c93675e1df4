"""Put adapters into a model, switch them, merge them, take them out again."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.errors import AdapterError
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.algebra import blend
from vislora.lora.dora import DoraConv2d, DoraLinear, DoraOutProjection
from vislora.lora.layers import LoraConv2d, LoraLinear, LoraMultiheadAttention, LoraOutProjection
from vislora.lora.low_rank import LowRank, Rows
from vislora.lora.mixed import Assignment, mixed
from vislora.lora.names import fits, inside, submodule
from vislora.lora.reads import frozen_weight, set_frozen_weight

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
_BIASES = ("bias", "in_proj_bias")  # the second of an nn.MultiheadAttention's q, k and v
_PLAIN = {adapted: plain for kind in (_ADAPTED, _ADAPTED_DORA) for plain, adapted in kind.items()}


@dataclass(frozen=True)
class TargetLayer:
    """A layer to adapt: its name in the model, and the output rows of each pair (None: one pair over all rows)."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class LoraSettings:
    """How new low-rank pairs are made; see `LowRank`.

    `rank_pattern` and `alpha_pattern` give other values to some layers: a key is a regular expression for the end of
    a layer's name, beginning where a word between dots does, and the first one that fits counts (PEFT's rule).
    `bias` says which biases are trained with the pairs: none, those of the adapted layers, or all.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    pissa: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def low_rank(self, target: TargetLayer, weight: Tensor) -> LowRank:
        """Untrained pairs for one layer."""
        rank = _by_pattern(self.rank_pattern, target.name, self.rank)
        alpha = _by_pattern(self.alpha_pattern, target.name, self.alpha)
        return LowRank(weight, rank, alpha, self.dropout, self.rslora, target.rows, self.dora, self.pissa)


@dataclass
class _Held:
    """One adapter in its live form: low-rank modules, and its own copies of the fully trained modules and biases, by
    name."""

    layers: dict[str, LowRank]
    trained: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]


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
        self._base_biases: dict[str, nn.Parameter] = {}  # likewise
        self._base_weights: dict[str, nn.Parameter] = {}  # of merged layers
        self._mixing = False  # each sample has its own adapter
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
            targets: the layers to adapt, each an nn.Linear, an ungrouped, undilated nn.Conv2d or an
                nn.MultiheadAttention (its fused q, k and v; its `out_proj` is a layer of its own).
            settings: rank, alpha, dropout of all of them.
            trained: names of modules to train in full beside them; the adapter gets its own copies.

        Raises:
            AdapterError: the name is taken, there are no targets or one twice, or a module is missing, of another class
                or part of one that is trained in full.
        """
        with self._on_the_base():
            layers: dict[str, LowRank] = {}
            for target in targets:
                if target.name in layers:
                    raise AdapterError(f"{target.name} is named twice among the targets")
                weight = frozen_weight(self._adaptable(target.name, settings.dropout))
                layers[target.name] = settings.low_rank(target, weight)
            for pattern in [*settings.rank_pattern, *settings.alpha_pattern]:
                if not any(fits(pattern, path) for path in layers):
                    raise AdapterError(
                        f"the rank or alpha pattern {pattern!r} fits none of the {len(layers)} adapted layers: "
                        f"{', '.join(list(layers)[:4])}, …"
                    )
            copies = {path: copy.deepcopy(self._module(path)) for path in trained}
            self._hold(name, _Held(layers, copies, self._biases(settings.bias, layers, copies)))

    def load(self, name: str, adapter: Adapter) -> None:
        """Add a trained adapter and make it active.

        Raises:
            AdapterError: the name is taken, the adapter is empty, or one of its layers doesn't fit the model.
        """
        with self._on_the_base():
            layers = {path: self._low_rank(path, weights, adapter.dropout) for path, weights in adapter.layers.items()}
            trained = {path: self._trained(path, state) for path, state in adapter.trained.items()}
            biases = {path: self._bias(path, value) for path, value in adapter.biases.items()}
            self._hold(name, _Held(layers, trained, biases))

    def adapter(self, name: str) -> Adapter:
        """A copy, on the CPU, of an adapter's values as trained, whatever `scale` says.

        Raises:
            AdapterError: there is none of this name.
        """
        held = self._get(name)
        layers = {}
        for path, low in held.layers.items():
            weight = frozen_weight(self._module(path))
            out = weight.shape[0]
            rows = None if low.rows == ((0, out),) else low.rows
            a, b = (matrix.detach().cpu().clone() for matrix in low.acting())
            rank = b.shape[1]
            ratio = rank / low.rank  # PiSSA's start doubles the rank; the scale stays what it was
            alpha = low.alpha * (math.sqrt(ratio) if low.rslora else ratio)
            magnitude = None if low.magnitude is None else low.all_magnitudes(weight).detach().cpu()
            layers[path] = LowRankWeights(a, b, rank, alpha, out, low.rslora, rows, magnitude)
        trained = {
            path: {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
            for path, module in held.trained.items()
        }
        biases = {path: bias.detach().cpu().clone() for path, bias in held.biases.items()}
        dropout = max((low.dropout for low in held.layers.values()), default=0.0)
        return Adapter(layers, trained, dropout, biases=biases)

    def activate(self, name: str) -> None:
        """Make one adapter the active one.

        Raises:
            AdapterError: there is none of this name, or `per_sample` is at work.
        """
        held = self._get(name)
        self.deactivate()
        self.model.requires_grad_(False)
        for path, low in held.layers.items():
            layer = self._module(path)
            device = frozen_weight(layer).device
            layer.lora = (low if low.lora_A.device == device else low.to(device)).requires_grad_(True)
            _adapt(layer)
        for path, module in held.trained.items():
            base = self._module(path)
            self._base_modules[path] = base
            own = module.to(next(base.parameters()).device).train(base.training).requires_grad_(True)
            self.model.set_submodule(path, own)
        for path, bias in held.biases.items():
            base = self._parameter(path)
            self._base_biases[path] = base
            bias.data = bias.data.to(base.device)
            self._set_parameter(path, bias.requires_grad_(True))
        self.active = name

    def deactivate(self) -> None:
        """Leave the base model alone in place, frozen; adapters stay and can be activated again.

        Raises:
            AdapterError: `per_sample` is at work.
        """
        self._check_unmixed()
        if self._base_weights:
            self.unmerge()
        if self.active is None:
            return
        for path in self._held[self.active].layers:
            layer = self._module(path)
            layer.__class__ = _PLAIN[type(layer)]
            del layer.lora
        for path, module in self._base_modules.items():
            own = self._module(path)
            self.model.set_submodule(path, module.to(next(own.parameters()).device).train(own.training))
        for path, bias in self._base_biases.items():
            bias.data = bias.data.to(self._parameter(path).device)
            self._set_parameter(path, bias)
        self._base_modules.clear()
        self._base_biases.clear()
        self.active = None

    @contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[None]:
        """Meanwhile each sample of a batch goes through its own adapter, and through its head: None is the base model.

            with adapters.per_sample(["cats", "birds", "cats", None]):
                logits = model(images)  # [4, K]

        The result is that of each sample alone with its adapter. Where heads differ in their number of classes, K is
        the largest, and logits beyond a sample's own classes are -inf: softmax gives them 0. Gradients reach each
        adapter from its samples alone; all adapters in use are part of `model.parameters()` meanwhile. Layers may get
        the batch folded with windows in their first dimension, sample by sample, as timm does it.

        Raises:
            AdapterError: an unknown name, a merged model, trained biases, a layer that can't differ within a batch, or
                a batch of another size than names.
        """
        if self._base_weights:
            raise AdapterError(f"adapter {self.active!r} is merged into the weights; unmerge first")
        assignment, back = Assignment.of(names), self.active
        held = [_Held({}, {}, {}) if name is None else self._get(name) for name in assignment.names]
        if biased := [name for name, one in zip(assignment.names, held, strict=True) if one.biases]:
            raise AdapterError(f"adapter {biased[0]!r} trains biases, which can't differ within a batch")
        whole = _all(one.trained for one in held)
        for path in _all(one.layers for one in held):
            if around := [module for module in whole if inside(path, module)]:
                raise AdapterError(
                    f"{path} is adapted by one adapter and part of {around[0]}, which another trains in full; they "
                    "can't share a batch"
                )
        self.deactivate()
        layers = {path: [one.layers.get(path) for one in held] for path in _all(one.layers for one in held)}
        trained = {path: [one.trained.get(path) for one in held] for path in _all(one.trained for one in held)}
        trained = {
            path: [self._module(path) if own is None else own for own in modules] for path, modules in trained.items()
        }
        self.model.requires_grad_(False)
        self._mixing = True
        try:
            with mixed(self.model, assignment, layers, trained):
                yield
        finally:
            self._mixing = False
            if back is not None:
                self.activate(back)

    def blend(
        self,
        name: str,
        weights: Mapping[str, float],
        how: str = "svd",
        rank: int | None = None,
        head: str | None = None,
    ) -> dict[str, float]:
        """Add a weighted sum of adapters as a new one and make it active; see `vislora.lora.algebra.blend`.

        Args:
            name: a new name.
            weights: a factor for each adapter, by name.
            how: "svd", "cat" or "linear".
            rank: of "svd".
            head: the adapter whose fully trained modules the new one takes, where they differ.

        Returns:
            the energy that each layer keeps of the sum, by name.

        Raises:
            AdapterError: an unknown name, one that is taken, or adapters that can't be summed.
        """
        if head is not None and head not in weights:
            raise AdapterError(f"head={head!r} is none of the blended adapters {', '.join(weights)}")
        values = [self.adapter(one) for one in weights]
        done = blend(values, list(weights.values()), how, rank, None if head is None else list(weights).index(head))
        self.load(name, done.adapter)
        return done.energy

    def scale(self, name: str, multiplier: float) -> None:
        """Apply an adapter at another strength: 0 is the base model (with the adapter's head), 1 as trained.

        Raises:
            AdapterError: there is none of this name, or it is merged.
        """
        if self._base_weights and name == self.active:
            raise AdapterError(f"adapter {name!r} is merged into the weights; unmerge before changing its scale")
        for low in self._get(name).layers.values():
            low.multiplier = multiplier

    def remove(self, name: str) -> None:
        """Take an adapter out; with the last one gone, the model is bit for bit what it was.

        Raises:
            AdapterError: there is none of this name, or `per_sample` is at work.
        """
        self._check_unmixed()
        self._get(name)
        if self.active == name:
            self.deactivate()
        del self._held[name]
        if not self._held:
            self._restore_flags()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapter into the frozen weights: W0 + s B A (with DoRA at its magnitudes), summed in
        float32 and rounded once to W0's dtype.

        The base weights are kept aside. The model computes without a low-rank path until `unmerge`.

        Raises:
            AdapterError: no adapter is active, or it is merged already.
        """
        if self.active is None or self._base_weights:
            raise AdapterError("nothing to merge: no adapter is active" if not self.active else "merged already")
        for path, low in self._held[self.active].layers.items():
            layer = self._module(path)
            weight = frozen_weight(layer)
            self._base_weights[path] = weight
            # a parameter of its own: the base's may be another layer's too
            set_frozen_weight(layer, nn.Parameter(low.merged(weight).to(weight.dtype), requires_grad=False))
            layer.__class__ = _PLAIN[type(layer)]

    def unmerge(self) -> None:
        """Undo `merge`: the base weights come back bit for bit, the adapter acts beside them again.

        Raises:
            AdapterError: nothing is merged.
        """
        if not self._base_weights:
            raise AdapterError("nothing to unmerge")
        for path, weight in self._base_weights.items():
            layer = self._module(path)
            merged = frozen_weight(layer)
            weight.data = weight.data.to(merged.device, merged.dtype)  # where the model has gone meanwhile
            set_frozen_weight(layer, weight)
            _adapt(layer)
        self._base_weights.clear()

    def merge_and_unload(self) -> None:
        """Fold the active adapter into the weights for good: a plain model is left, with the adapter's fully trained
        modules and biases in place, and no adapters.

        Raises:
            AdapterError: no adapter is active, or it is merged already.
        """
        self.merge()
        for path in self._base_weights:
            del self._module(path).lora
        for kept in (self._base_weights, self._base_modules, self._base_biases, self._held):
            kept.clear()
        self.active = None
        self._restore_flags()

    def _restore_flags(self) -> None:
        for path, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(path, parameter.requires_grad))

    @contextmanager
    def _on_the_base(self) -> Iterator[None]:
        """Meanwhile no adapter is in place, so that a new one is made of the base model's own weights and modules;
        after an error the one before is back."""
        back, merged = self.active, bool(self._base_weights)
        self.deactivate()
        try:
            yield
        except BaseException:
            if back is not None and self.active is None:
                self.activate(back)
                if merged:
                    self.merge()
            raise

    def _hold(self, name: str, held: _Held) -> None:
        if name in self._held:
            raise AdapterError(f"an adapter named {name!r} is there already; remove it first or choose another name")
        if not held.layers:
            raise AdapterError(f"adapter {name!r} has no layers; name at least one target")
        for path, module in held.trained.items():
            if next(module.parameters(), None) is None:
                raise AdapterError(f"{path} has no parameters to train; a model made with num_classes=0 has no head")
            others = [*held.layers, *held.biases, *(one for one in held.trained if one != path)]
            if parts := [one for one in others if inside(one, path)]:
                raise AdapterError(f"{parts[0]} is part of {path}, which is trained in full; leave one of them out")
        named: dict[nn.Module, str] = {}
        for path in held.layers:
            if (first := named.setdefault(self._module(path), path)) != path:
                raise AdapterError(f"{first} and {path} are one module; name it once")
        self._held[name] = held
        self.activate(name)

    def _check_unmixed(self) -> None:
        if self._mixing:
            raise AdapterError("each sample has its own adapter: leave per_sample before adding or switching adapters")

    def _get(self, name: str) -> _Held:
        if name not in self._held:
            raise AdapterError(f"no adapter named {name!r}; there is {', '.join(self._held) or 'none'}")
        return self._held[name]

    def _module(self, path: str) -> nn.Module:
        module = submodule(self.model, path)
        if module is None:
            raise AdapterError(
                f"the adapter belongs to another model: {type(self.model).__name__} has no module {path!r}"
            )
        return module

    def _parameter(self, path: str) -> nn.Parameter:
        module, _, key = path.rpartition(".")
        parameter = self._module(module)._parameters.get(key)
        if parameter is None:
            raise AdapterError(f"the adapter belongs to another model: {module} has no {key}")
        return parameter

    def _set_parameter(self, path: str, parameter: nn.Parameter) -> None:
        module, _, key = path.rpartition(".")
        self._module(module)._parameters[key] = parameter

    def _biases(self, wanted: str, layers: Iterable[str], trained: Iterable[str]) -> dict[str, nn.Parameter]:
        """Copies of the biases to train, by name; those of modules trained in full are trained with them."""
        if wanted == "none":
            return {}
        adapted = {f"{path}.{key}" for path in layers for key in _BIASES}
        found = {
            path: nn.Parameter(bias.detach().clone())
            for path, bias in self.model.named_parameters()
            if path.rpartition(".")[2] in _BIASES
            and not any(inside(path, module) for module in trained)
            and (wanted == "all" or path in adapted)
        }
        if not found:
            raise AdapterError(f"bias={wanted}: none of the layers concerned has a bias")
        return found

    def _bias(self, path: str, value: Tensor) -> nn.Parameter:
        base = self._parameter(path)
        if base.shape != value.shape:
            raise AdapterError(f"{path} has shape {list(value.shape)}, the model needs {list(base.shape)}")
        return nn.Parameter(value.to(base.dtype, copy=True))

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
        if frozen_weight(layer) is None:
            raise AdapterError(f"{path} computes its weight (weight_norm, pruning); take that out of it first")
        if plain is nn.Conv2d and (reason := unlike_a_product(layer)):
            raise AdapterError(f"{path} can't be adapted: {reason}")
        return layer

    def _low_rank(self, path: str, weights: LowRankWeights, dropout: float) -> LowRank:
        weight = frozen_weight(self._adaptable(path))
        dora = weights.magnitude is not None
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
            low.magnitude = nn.Parameter(own.to(weight.device, low.magnitude.dtype, copy=True))
        return low

    def _trained(self, path: str, state: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self._module(path))
        if isinstance(module, nn.Linear) and "weight" in state:  # a head may have another number of classes
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
        return module.requires_grad_(True)


def _all(dicts: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for one in dicts for key in one))


def _adapt(layer: nn.Module) -> None:
    kinds = _ADAPTED if layer.lora.magnitude is None else _ADAPTED_DORA
    if type(layer) not in kinds:
        raise AdapterError(f"a {type(layer).__name__} is adapted already, by another Adapters object")
    layer.__class__ = kinds[type(layer)]


def _by_pattern(pattern: Mapping[str, float], name: str, default: float) -> float:
    return next((value for key, value in pattern.items() if fits(key, name)), default)


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
