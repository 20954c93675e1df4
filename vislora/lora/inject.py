"""Put adapters into a model, switch them, merge them, take them out again."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.adaptable import (
    adapt,
    carries,
    check_exchangeable,
    form_of,
    is_known,
    is_opaque,
    is_wrapped,
    restore_class,
    told,
    unadapted,
)
from vislora.lora.adapter import Adapter
from vislora.lora.adapter_modules import AdapterModules
from vislora.lora.algebra import blend
from vislora.lora.low_rank import LowRank
from vislora.lora.mixed import Assignment, mixed
from vislora.lora.names import inside, module_named, parameter_named, set_parameter
from vislora.lora.reads import frozen_weight, is_sharded, set_frozen_weight
from vislora.lora.settings import LoraSettings, TargetLayer


class Adapters:
    """The named adapters of one model, at most one of them active.

    The base model is frozen while adapters are there. Only the active adapter's parameters are part of the model (and
    of `model.parameters()`); switching moves references, nothing is rebuilt. With none left, the model is what it
    was: the same module objects, classes, parameters and `requires_grad` flags.

    Raises:
        AdapterError: the model has adapters of another object, or is a wrapper, as torch.compile makes it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._held: dict[str, AdapterModules] = {}
        # the base's modules and biases in whose place are the active adapter's own
        self._base: AdapterModules | None = None
        self._base_weights: dict[str, nn.Parameter] = {}  # of merged layers
        self._mixing = False  # each sample has its own adapter
        self._flags: dict[str, bool] = {}  # requires_grad of the model's parameters without adapters
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        if inner := "module" if parallel else "_orig_mod" if "_orig_mod" in model._modules else None:
            raise AdapterError(
                f"a {type(model).__name__} is around the model, and the names of its layers begin with {inner}; adapt "
                f"its .{inner}, "
                # DataParallel's replicas hold plain tensors, which adapted layers don't compute with
                + ("and wrap it in DistributedDataParallel" if parallel else "which is compiled again by itself")
            )
        if any(isinstance(module, LowRank) for module in model.modules()):
            raise AdapterError("the model holds adapters already; use the Adapters object that put them there")

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def add(
        self, name: str, targets: Iterable[TargetLayer | str], settings: LoraSettings, trained: Iterable[str] = ()
    ) -> None:
        """Add an untrained adapter and make it active.

        Args:
            name: a new name.
            targets: the layers to adapt, or their names; each an nn.Linear (quantised or not), an ungrouped, undilated
                nn.Conv2d or an nn.MultiheadAttention (its fused q, k and v; its `out_proj` is a layer of its own).
            settings: rank, alpha, dropout of all of them.
            trained: names of modules to train in full beside them; the adapter gets its own copies.

        Raises:
            AdapterError: the name is taken, there are no targets or one twice, or a module is missing, of another class
                or part of one that is trained in full.
        """
        with self._on_the_base():
            self._hold(name, AdapterModules.new(self.model, targets, settings, trained))

    def load(self, name: str, adapter: Adapter) -> None:
        """Add a trained adapter and make it active.

        Raises:
            AdapterError: the name is taken, the adapter is empty, or one of its layers doesn't fit the model.
        """
        with self._on_the_base():
            self._hold(name, AdapterModules.of(self.model, adapter))

    def adapter(self, name: str) -> Adapter:
        """A copy, on the CPU, of an adapter's values as trained, whatever `scale` says. Where a model is sharded,
        all processes have to ask for it.

        Raises:
            AdapterError: there is none of this name, or a part of it isn't in its place any more.
        """
        held = self._get(name)
        if name == self.active:
            self._check_in_place()
        return held.values({path: self._base_weight(path) for path in held.layers})

    def activate(self, name: str) -> None:
        """Make one adapter the active one; after an error the one before still is.

        Raises:
            AdapterError: there is none of this name, `per_sample` is at work, or the layers have changed meanwhile.
        """
        held = self._get(name)
        with self._on_the_base():
            self._put_in(name, held)

    def deactivate(self) -> None:
        """Leave the base model alone in place, frozen; adapters stay and can be activated again.

        Raises:
            AdapterError: `per_sample` is at work, or a part of the adapter isn't in its place any more.
        """
        self._check_unmixed()
        if self.active is None:
            return
        self._check_removable()
        if self._base_weights:
            self.unmerge()
        self._base.follow(self.model)
        held = self._held[self.active]
        held.dtype = self._base.dtype
        for path in held.layers:
            layer = module_named(self.model, path)
            restore_class(layer)
            del layer.lora
        for path, module in self._base.trained.items():
            self.model.set_submodule(path, module.train(module_named(self.model, path).training))
        for path, bias in self._base.biases.items():
            set_parameter(self.model, path, bias)
        self._base = self.active = None

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
        held = [AdapterModules({}, {}, {}) if name is None else self._get(name) for name in assignment.names]
        if biased := [name for name, one in zip(assignment.names, held, strict=True) if one.biases]:
            raise AdapterError(f"adapter {biased[0]!r} trains biases, which can't differ within a batch")
        adapted, whole = _all(one.layers for one in held), _all(one.trained for one in held)
        for path in [*adapted, *whole]:
            if around := [module for module in whole if module != path and inside(path, module)]:
                raise AdapterError(
                    f"{path} is adapted, or trained in full, by one adapter and part of {around[0]}, which another "
                    "trains in full; they can't share a batch"
                )
        self.deactivate()
        try:
            for path in adapted:
                unadapted(self.model, path)
            layers = {path: [one.layers.get(path) for one in held] for path in adapted}
            bases = {path: module_named(self.model, path) for path in whole}
            trained = {path: [one.trained.get(path, base) for one in held] for path, base in bases.items()}
            for name in filter(None, assignment.names):
                self._get(name).follow(self.model)
            self.model.requires_grad_(False)
            self._mixing = True
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
            AdapterError: there is none of this name, or it is merged; or the multiplier is no finite number.
        """
        if not math.isfinite(multiplier):
            raise AdapterError(f"adapter {name!r} can't be scaled by {multiplier}; give a finite number")
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

        The base weights are kept aside. The model computes without a low-rank path until `unmerge`; meanwhile its state
        dict is a plain model's, of the merged weights.

        Raises:
            AdapterError: no adapter is active, it is merged already, the model is sharded, or a part of the adapter
                isn't in its place any more.
        """
        if self.active is None or self._base_weights:
            raise AdapterError("nothing to merge: no adapter is active" if not self.active else "merged already")
        self._check_removable()
        layers = {path: module_named(self.model, path) for path in self._held[self.active].layers}
        if sharded := [path for path, layer in layers.items() if is_sharded(frozen_weight(layer))]:
            raise AdapterError(f"{sharded[0]} is sharded, and shards can't be merged; merge in a whole model")
        if opaque := [path for path, layer in layers.items() if is_opaque(layer)]:
            raise AdapterError(
                f"{opaque[0]} is {told(layers[opaque[0]])}, into which nothing can be merged; merge in a model that "
                "isn't quantised"
            )
        merged = {}
        for path, low in self._held[self.active].layers.items():  # all of them first: memory may not suffice
            weight = frozen_weight(layers[path])
            # a parameter of its own: the base's may be another layer's too
            merged[path] = nn.Parameter(low.merged(weight).to(weight.dtype), requires_grad=False)
        for path, weight in merged.items():
            self._base_weights[path] = frozen_weight(layers[path])
            set_frozen_weight(layers[path], weight)
            restore_class(layers[path])
            layers[path].lora.is_merged = True

    def unmerge(self) -> None:
        """Undo `merge`: the base weights come back bit for bit, the adapter acts beside them again.

        Raises:
            AdapterError: nothing is merged, or a part of the adapter isn't in its place any more.
        """
        if not self._base_weights:
            raise AdapterError("nothing to unmerge")
        self._check_removable()
        for path, weight in [*self._base_weights.items()]:
            layer = module_named(self.model, path)
            merged = frozen_weight(layer)
            weight.data = weight.data.to(merged.device, merged.dtype)  # where the model has gone meanwhile
            set_frozen_weight(layer, weight)
            adapt(layer)
            layer.lora.is_merged = False
            del self._base_weights[path]  # one by one: that device's memory may not suffice

    def merge_and_unload(self) -> None:
        """Fold the active adapter into the weights for good: a plain model is left, with the adapter's fully trained
        modules and biases in place, and no adapters.

        Raises:
            AdapterError: no adapter is active, or it is merged already.
        """
        self.merge()
        for path in self._base_weights:
            del module_named(self.model, path).lora
        self._base_weights.clear()
        self._held.clear()
        self._base = self.active = None
        self._restore_flags()

    @torch.inference_mode()  # what was made in there can't be told outside to require gradients
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

    def _hold(self, name: str, held: AdapterModules) -> None:
        if name in self._held:
            raise AdapterError(f"an adapter named {name!r} is there already; remove it first or choose another name")
        if not held.layers:
            raise AdapterError(f"adapter {name!r} has no layers; name at least one target")
        held.check(self.model)
        if not self._held:
            # under all of its names: layers that share a weight each get their own where it is merged
            named = self.model.named_parameters(remove_duplicate=False)
            self._flags = {path: p.requires_grad for path, p in named}
        self._put_in(name, held)
        self._held[name] = held

    def _put_in(self, name: str, held: AdapterModules) -> None:
        # all that can fail comes first
        layers = {path: unadapted(self.model, path) for path in held.layers}
        held.follow(self.model)
        self._base = AdapterModules(held.layers, {}, {}, held.dtype)
        with torch.inference_mode():  # as in `_restore_flags`
            self.model.requires_grad_(False)
            for path, low in held.layers.items():
                layers[path].lora = low.requires_grad_(True)
                adapt(layers[path])
            for path, module in held.trained.items():
                base = module_named(self.model, path)
                self._base.trained[path] = base
                self.model.set_submodule(path, module.train(base.training).requires_grad_(True))
            for path, bias in held.biases.items():
                self._base.biases[path] = parameter_named(self.model, path)
                set_parameter(self.model, path, bias.requires_grad_(True))
        self.active = name

    def _base_weight(self, path: str) -> Tensor:
        """The base model's own weight of a layer, also where an adapter is merged into the one in place; where that is
        opaque, what stands for it."""
        layer = module_named(self.model, path)
        weight = self._base_weights.get(path, form_of(layer))
        if weight is None:
            raise AdapterError(f"{path} has become a {type(layer).__name__}, which has no weight of its own")
        return weight

    def _check_in_place(self) -> None:
        """Refuse to go on where the model's layers were replaced beside the active adapter: it would be torn apart."""
        held = self._held[self.active]
        for path, part in [*held.layers.items(), *held.trained.items()]:
            there = module_named(self.model, path)
            if not (carries(there, part) if path in held.layers else is_wrapped(there, part)):
                raise AdapterError(
                    f"{path} was replaced, or adapted by another Adapters object or PEFT, since adapter "
                    f"{self.active!r} was put in; take that out first, or begin again with a new model"
                )

    def _check_removable(self) -> None:
        """Refuse as well where a layer's class, forward or weight was changed on top of the adapter's."""
        self._check_in_place()
        for path in self._held[self.active].layers:
            if not is_known(layer := module_named(self.model, path)):
                raise AdapterError(
                    f"{path} has become a {type(layer).__name__}, as fully_shard makes it of a layer by itself; shard "
                    "the block around it"
                )
            check_exchangeable(layer, path)

    def _check_unmixed(self) -> None:
        if self._mixing:
            raise AdapterError("each sample has its own adapter: leave per_sample before adding or switching adapters")

    def _get(self, name: str) -> AdapterModules:
        if name not in self._held:
            raise AdapterError(f"no adapter named {name!r}; there is {', '.join(self._held) or 'none'}")
        return self._held[name]


def _all(dicts: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for one in dicts for key in one))
