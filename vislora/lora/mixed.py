"""Many adapters in one batch: each sample goes through its own.

The frozen product is one for the whole batch. The low-rank ones are batched products over the samples, with every
sample's A and B gathered from the adapters in use; so their number doesn't grow with that of the adapters. A sample
without an adapter gets zeros. Fully trained modules (heads) run once for each adapter, on its samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.adaptable import is_opaque
from vislora.lora.dora import row_gain
from vislora.lora.fused import compute_dtype, explicit_padding
from vislora.lora.low_rank import LowRank
from vislora.lora.reads import adapted_weight, frozen_weight, without_autocast


@dataclass(frozen=True)
class Assignment:
    """Which adapter each of B samples goes through: `index` [B] counts `names`, None among them for the base model."""

    names: tuple[str | None, ...]
    index: tuple[int, ...]

    @staticmethod
    def of(samples: Sequence[str | None]) -> "Assignment":
        names = tuple(dict.fromkeys(samples))
        return Assignment(names, tuple(names.index(name) for name in samples))

    def check(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: the first tensor that the model is given is a batch of as many samples."""
        first = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if first is not None and first.shape[:1] != (len(self.index),):
            raise AdapterError(
                f"{type(model).__name__} gets an input of {list(first.shape)} for {len(self.index)} adapter names; "
                "give one name, or None, per sample"
            )

    def windows(self, x: Tensor, what: str) -> int:
        """n, where the rows of x [B * n, …] belong to the samples n by n.

        Raises:
            AdapterError: the rows don't divide so.
        """
        count = len(self.index)
        if x.shape[0] == 0 or x.shape[0] % count:
            raise AdapterError(
                f"{what} gets {list(x.shape)} for a batch of {count}; one adapter per sample needs the samples, each "
                "as one row or as equally many, in the first dimension"
            )
        return x.shape[0] // count

    def rows(self, x: Tensor, what: str) -> Tensor:
        """The index of every row of x [B * n, …], on its device."""
        return self.on(x.device).repeat_interleave(self.windows(x, what))

    def on(self, device: torch.device) -> Tensor:
        """The index on a device, [B], made there without waiting for it."""
        return torch.tensor(self.index).to(device, non_blocking=True)


@contextmanager
def mixed(
    model: nn.Module,
    assignment: Assignment,
    layers: Mapping[str, Sequence[LowRank | None]],
    trained: Mapping[str, Sequence[nn.Module]],
) -> Iterator[None]:
    """Meanwhile the model takes batches of the assignment's samples, each through its own adapter.

    Args:
        model: without an active adapter.
        assignment: of the samples to adapters.
        layers: pairs by the name of the adapted layer, one for each of the assignment's names.
        trained: modules by name, likewise.

    Raises:
        AdapterError: a layer that can't differ within a batch, or a batch of another size.
    """
    bases = {path: model.get_submodule(path) for path in [*layers, *trained]}
    if odd := [path for path in layers if type(bases[path]) not in _MIXED or is_opaque(bases[path])]:
        kind = type(bases[odd[0]]).__name__
        raise AdapterError(
            f"{', '.join(odd)} ({kind}) can't have an adapter for each sample; only Linear and Conv2d can, and none "
            "that is quantised"
        )
    named = model.named_modules()
    if first := [path for path, part in named if isinstance(part, nn.MultiheadAttention) and not part.batch_first]:
        # a sequence that the batch divides would pass for samples with as many rows each
        raise AdapterError(
            f"{first[0]} has batch_first=False: there the sequence comes before the batch, and one adapter per sample "
            "needs the samples first; activate each adapter for its own samples instead"
        )
    handle = model.register_forward_pre_hook(assignment.check, with_kwargs=True)
    for path, held in layers.items():
        layer = bases[path]
        layer.lora = MixedLowRank(assignment, held, path).to(frozen_weight(layer).device).train(layer.training)
        layer.__class__ = _MIXED[type(layer)]
    for path, modules in trained.items():
        model.set_submodule(path, MixedModule(assignment, modules, path).train(bases[path].training))
    try:
        yield
    finally:
        handle.remove()
        for path in layers:
            layer = bases[path]
            layer.__class__ = _PLAIN[type(layer)]
            del layer.lora
        for path in trained:
            model.set_submodule(path, bases[path].train(model.get_submodule(path).training))


class MixedLowRank(nn.Module):
    """The pairs of one layer in all adapters of an assignment."""

    dropout = 0.0  # on a weight that is read as a whole, which `merged` refuses anyway

    def __init__(self, assignment: Assignment, held: Sequence[LowRank | None], path: str) -> None:
        super().__init__()
        self.assignment, self.path = assignment, path
        self.held = nn.ModuleList([low for low in held if low is not None])
        found = iter(self.held)
        self._by_name = [None if low is None else next(found) for low in held]

    def stacked(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [G, R, in, …] and s B [G, out, R] of all G adapters, with zeros up to the largest R of a pair's stack."""
        out = weight.shape[0]
        acting = [None if low is None else (low.acting()[0], low.wide_B(out) * low.scale) for low in self._by_name]
        width = max(a.shape[0] for a, _ in filter(None, acting))
        first = next(a for a, _ in filter(None, acting))
        none = first.new_zeros(width, *first.shape[1:]), first.new_zeros(out, width)
        pairs = [none if pair is None else _widened(*pair, width) for pair in acting]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def gains(self, weight: Tensor) -> Tensor | None:
        """DoRA's factor on every output row, [G, out], 1 in adapters without it; None where none has it."""
        if all(low is None or low.magnitude is None for low in self._by_name):
            return None
        ones = torch.ones(weight.shape[0], device=weight.device)
        with without_autocast(weight):
            return torch.stack(
                [ones if low is None or low.magnitude is None else row_gain(low, weight) for low in self._by_name]
            )

    def dropped(self, x: Tensor, index: Tensor) -> Tensor:
        """x [B, …] with each sample's own dropout."""
        rates = torch.tensor([0.0 if low is None else low.dropout for low in self._by_name])
        rates = rates.to(x.device, non_blocking=True)
        keep = 1.0 - rates[index].view(-1, *[1] * (x.dim() - 1))
        return x * ((torch.rand(x.shape, device=x.device) < keep) / keep).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        raise AdapterError(
            f"the weight of {self.path} is read as a whole, which can't be another one for each sample; "
            "leave that layer out of the adapters, or run their samples apart"
        )

    def drops(self) -> bool:
        return self.training and any(low.dropout for low in self.held)


class MixedLinear(nn.Linear):
    """A Linear with another low-rank update for each sample; made by `Adapters.per_sample`, never constructed."""

    lora: MixedLowRank
    weight = property(adapted_weight)  # a model may hand it to F.linear

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, …, in], or [B * windows, …, in] -> […, out]."""
        x, mixed, weight = input, self.lora, frozen_weight(self)
        dtype = compute_dtype(x, weight)
        mixed.assignment.windows(x, mixed.path)  # or an error
        index = mixed.assignment.on(x.device)
        a, b = (matrix[index] for matrix in mixed.stacked(weight))
        gains = mixed.gains(weight)
        own = x.reshape(len(index), -1, x.shape[-1])  # a sample's windows lie behind one another
        bias = self.bias if gains is None else None
        if mixed.drops():
            y = _spelled_out(mixed, own, index, weight, a, b, None if gains is None else gains[index], dtype)
            y = y if self.bias is None else y + self.bias.to(dtype)
        else:
            y = _MixedProduct.apply(own, weight, bias, a, b, dtype)
            if gains is not None:
                y = y * gains[index][:, None].to(dtype)
                y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class MixedConv2d(nn.Conv2d):
    """The same for an ungrouped Conv2d: one convolution by all adapters' A, of which each sample takes its own."""

    lora: MixedLowRank
    weight = property(adapted_weight)

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, in, H, W], or [B * windows, in, H, W] -> […, out, H', W']."""
        mixed, weight = self.lora, frozen_weight(self)
        dtype = compute_dtype(input, weight)
        index = mixed.assignment.rows(input, mixed.path)
        a, b = mixed.stacked(weight)
        gains = mixed.gains(weight)
        with without_autocast(input):
            x = input.to(dtype)
            dropped = mixed.dropped(x, index) if mixed.drops() else x
            y = self._frozen(x)
            h = self._project(dropped, a.flatten(0, 1).to(dtype)).unflatten(1, a.shape[:2])
            update = torch.bmm(b[index].to(dtype), h[torch.arange(len(x), device=x.device), index].flatten(2))
            update = update.view_as(y)
            if gains is None:
                y = y + update
            else:
                gain = gains[index][:, :, None, None].to(dtype)
                y = y + (gain - 1) * (y if dropped is x else self._frozen(dropped)) + gain * update
            return y if self.bias is None else y + self.bias.to(dtype)[:, None, None]

    def _frozen(self, x: Tensor) -> Tensor:
        return self._project(x, frozen_weight(self).to(x.dtype))

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, explicit_padding(self))


class MixedModule(nn.Module):
    """A fully trained module, another one for each adapter; the base model's for samples whose adapter has none."""

    def __init__(self, assignment: Assignment, modules: Sequence[nn.Module], path: str) -> None:
        super().__init__()
        self.assignment, self.path = assignment, path
        self.each = nn.ModuleList(modules)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: [B, …], or [B * windows, …]; the rest, as masks and positions, goes to all. Logits [B, K] have the
        widest head's K, -inf beyond a sample's own."""
        rest = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        if len(self.each) > 1 and any(len(value) == len(input) for value in rest):
            raise AdapterError(
                f"{self.path} gets a second tensor of {len(input)} rows, and it can't be told whether they are the "
                "samples'; run each adapter's samples apart"
            )
        index = self.assignment.rows(input, self.path)
        order, parts = index.argsort(stable=True), []
        for group, module in enumerate(self.each):
            parts.append(module(input[index == group], *args, **kwargs))
        if len({part.shape[1:] for part in parts}) > 1:
            if any(part.dim() != 2 for part in parts):
                shapes = [list(part.shape) for part in parts]
                raise AdapterError(
                    f"{self.path} answers with {shapes} in the adapters of one batch; only logits may differ"
                )
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts]
        return torch.cat(parts)[order.argsort()]


_MIXED = {nn.Linear: MixedLinear, nn.Conv2d: MixedConv2d}
_PLAIN = {mixed: plain for plain, mixed in _MIXED.items()}


def _widened(a: Tensor, b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    missing = width - a.shape[0]
    if not missing:
        return a, b
    return F.pad(a, (*(0, 0) * (a.dim() - 1), 0, missing)), F.pad(b, (0, missing))


def _spelled_out(
    mixed: MixedLowRank,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula with dropout, by autograd, without bias: W0 x + (g - 1) W0 dropout(x) + g s B A dropout(x)."""
    with without_autocast(x):
        x, w = x.to(dtype), weight.to(dtype)
        dropped = mixed.dropped(x, index)
        y, update = F.linear(x, w), dropped @ a.to(dtype).mT @ b.to(dtype).mT
        if gain is None:
            return y + update
        gain = gain[:, None].to(dtype)
        return y + (gain - 1) * F.linear(dropped, w) + gain * update


class _MixedProduct(torch.autograd.Function):
    """y_i = x_i W0^T + b + (x_i A_i^T) B_i^T for x [B, n, in], A [B, R, in], B [B, out, R]; short sides are written
    first, as BLAS libraries are faster on them."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, dtype):
        with without_autocast(x):
            x_c, w, b_c = x.to(dtype), weight.to(dtype), b.to(dtype)
            y = F.linear(x_c, w, None if bias is None else bias.to(dtype))
            h_t = torch.bmm(a.to(dtype), x_c.mT)
            y.baddbmm_(h_t.mT, b_c.mT)
        ctx.save_for_backward(x_c, w, a, b, h_t)
        ctx.x_dtype, ctx.dtype = x.dtype, dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w, a, b, h_t = ctx.saved_tensors
        with without_autocast(x):
            dy = dy.to(ctx.dtype)
            dh_t = torch.bmm(b.to(ctx.dtype).mT, dy.mT)
            da, db = torch.bmm(dh_t, x).to(a.dtype), torch.bmm(h_t, dy).mT.to(b.dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = (dy @ w).baddbmm_(dh_t.mT, a.to(ctx.dtype)).to(ctx.x_dtype)
        return dx, None, None, da, db, None
