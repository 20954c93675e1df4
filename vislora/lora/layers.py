"""LoRA on Linear and Conv2d as one fused autograd step each.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds a trained low-rank product to a frozen projection:

    y = W0 x + b + s * B (A dropout(x)),    A: [r, in],  B: [out, r],  s = alpha / r

or s = alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

A layer becomes adaptable by changing its class in place (`nn.Linear` -> `LoraLinear`): the module stays the same
object, with its parameters, hooks and state-dict keys, and goes back to its old class when the adapter is removed.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.errors import AdapterError
from vislora.lora.pissa import principal_pair
from vislora.lora.reads import _autocasts, _without_autocast, adapted_weight, frozen_weight
from vislora.lora.small import added, is_narrow, is_short, summed

_MOST_DROPOUT = 0.99

Rows = tuple[tuple[int, int], ...]
"""Output rows [start, stop) of a projection that low-rank pairs write to, one range per pair."""

_TINY = torch.finfo(torch.float32).tiny


def row_norms(weight: Tensor) -> Tensor:
    """The length of each output row, [out], in float32 or wider."""
    return torch.linalg.vector_norm(weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1), dim=1)


class LowRank(nn.Module):
    """The trained part of one adapted layer: one or more low-rank pairs over the same input.

    A plain layer holds one pair over all its rows. A fused projection adapted in part (q and v of a timm `qkv`) holds
    one pair per chosen projection: their A are stacked, so that one product serves all, and each B writes to its rows.

    Args:
        weight: the frozen weight, [out, in] or [out, in, kh, kw]; gives shapes and device.
        rank: r of each pair.
        alpha: numerator of the scale.
        dropout: probability in [0, 0.99] of dropping an input element on the low-rank path, in training only.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        rows: the output rows of each pair; all rows as one pair by default.
        dora: train a magnitude for each of those rows as well; see `vislora.lora.dora`.
        pissa: start from the weight's principal part instead; see `vislora.lora.pissa`.

    Attributes:
        lora_A: [pairs * r, in] or [pairs * r, in, kh, kw], float32, Kaiming-uniform as in the paper's own code.
        lora_B: [sum of rows, r] or [sum of rows, r, 1, 1], float32, zero: an untrained adapter changes nothing.
        magnitude: [sum of rows], float32, the norms of the frozen rows; None without DoRA.
        start_A, start_B: with PiSSA, the frozen pairs that `lora_A` and `lora_B` started from, which are subtracted.
        multiplier: factor on the scale, 1.0 unless an adapter is applied at another strength.

    Raises:
        AdapterError: a rank, dropout, row range or combination that can't be.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        rows: Rows | None = None,
        dora: bool = False,
        pissa: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1 or not 0.0 <= dropout <= _MOST_DROPOUT:
            raise AdapterError(
                f"rank={rank}, dropout={dropout}: rank must be at least 1, dropout in [0, {_MOST_DROPOUT}]"
            )
        if any(not 0 <= start < stop <= weight.shape[0] for start, stop in rows or ()):
            raise AdapterError(f"rows {rows} don't lie in a layer of {weight.shape[0]} output rows")
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.rows = rows or ((0, weight.shape[0]),)
        self.pairs = _pairs(self.rows, 2 * rank if pissa else rank)
        self.multiplier = 1.0
        kernel, ones = weight.shape[2:], [1] * (weight.dim() - 2)
        height = sum(stop - start for start, stop in self.rows)
        a = torch.empty(
            len(self.rows) * rank,
            weight.shape[1],
            *kernel,
            dtype=torch.float32,
            device="meta" if weight.is_meta else "cpu",
        )
        # Each pair starts as it would alone: fan_in is the same, the draw is its own. Without storage there is nothing
        # to draw, and on the meta device it would take longer than all the rest.
        for pair in () if weight.is_meta else a.split(rank):
            nn.init.kaiming_uniform_(pair, a=math.sqrt(5))
        self.lora_A = nn.Parameter(a.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(height, rank, *ones, dtype=torch.float32, device=weight.device))
        self.register_parameter("magnitude", None)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if pissa:
            if dora or dropout:
                raise AdapterError("PiSSA goes with neither DoRA nor dropout, which would drop principal parts of W0")
            starts = [principal_pair(weight.detach()[slice(*r)], rank, self.scale) for r in self.rows]
            self.start_A, self.start_B = (torch.cat(part) for part in zip(*starts, strict=True))
            with torch.no_grad():
                self.lora_A.copy_(self.start_A)
                self.lora_B.copy_(self.start_B)
        if dora:
            norms = row_norms(weight.detach())
            self.magnitude = nn.Parameter(torch.cat([norms[start:stop] for start, stop in self.rows]))

    @property
    def scale(self) -> float:
        """s, the factor on B A."""
        return self.multiplier * self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def acting(self) -> tuple[Tensor, Tensor]:
        """A and B as the layer computes with them: with PiSSA [A; A0] and [B, -B0], each pair of rank 2r."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        a = torch.cat([m.unflatten(0, (-1, self.rank)) for m in (self.lora_A, self.start_A)], 1).flatten(0, 1)
        return a, torch.cat([self.lora_B, -self.start_B], 1)

    def merged(self, weight: Tensor) -> Tensor:
        """What the layer computes with: W0 + s B A, with DoRA its rows at their magnitudes; float32 or wider,
        differentiable.

        The norm that DoRA divides by is a constant for the gradient (section 4.3 of its paper).
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        update = self.scale * (self.wide_B(weight.shape[0]).to(dtype) @ self.acting()[0].to(dtype).flatten(1))
        merged = weight.to(dtype) + update.view(weight.shape)
        if self.magnitude is None:
            return merged
        gain = self.acting_magnitudes(weight) / row_norms(merged.detach()).clamp_min(_TINY)
        return merged * gain.view(-1, *[1] * (weight.dim() - 1))

    def wide_B(self, out: int) -> Tensor:
        """The acting B over all `out` rows of the layer, [out, pairs * its rank]: zero where a pair doesn't write."""
        a, b = self.acting()
        if self.rows == ((0, out),):
            return b.flatten(1)
        wide = b.new_zeros(out, a.shape[0])
        for pair in self.pairs:
            wide[pair.rows, pair.a] = b[pair.b].flatten(1)
        return wide

    def all_magnitudes(self, weight: Tensor) -> Tensor:
        """DoRA's magnitude of every output row, [out]: that of the frozen weight where no pair writes."""
        if self.rows == ((0, weight.shape[0]),):
            return self.magnitude
        full = row_norms(weight.detach())
        for pair in self.pairs:
            full[pair.rows] = self.magnitude[pair.b]
        return full

    def acting_magnitudes(self, weight: Tensor) -> Tensor:
        """The same at the adapter's strength: between the frozen row's length at 0 and the trained one at 1."""
        full = self.all_magnitudes(weight)
        return full if self.multiplier == 1.0 else torch.lerp(row_norms(weight.detach()), full, self.multiplier)


class LoraLinear(nn.Linear):
    """A Linear whose low-rank update is in `lora`; made by `Adapters`, never constructed.

    It acts in the layer's own forward, and in `weight` for a model that reads that instead.
    """

    lora: LowRank
    weight = property(adapted_weight)

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name for it, which some models call it by
        """input: [..., in] -> [..., out]."""
        x, low, weight = input, self.lora, frozen_weight(self)
        dropout = low.dropout if self.training else 0.0
        a, b = low.acting()
        settings = _Settings(low.scale, low.pairs, dropout, _compute_dtype(x, weight))
        narrow = not dropout and is_narrow(weight, a, b)
        if not (dropout or narrow) and is_short(x, weight):
            flat = x.to(settings.dtype).reshape(-1, x.shape[-1])
            y = added(flat, weight, self.bias, a, b, low.pairs, low.scale)
            return y.view(*x.shape[:-1], y.shape[-1])
        forward_alone = not (dropout or torch.is_grad_enabled())  # h is for backward
        if narrow or (forward_alone and weight.dtype.itemsize >= 4):
            return F.linear(x, summed(weight, a, b, low.pairs, low.scale), self.bias)
        # under autocast x is kept as a half-size copy: cheaper than making it again
        norm = _Normalised.behind(x) if x.dtype == settings.dtype else None
        return _FusedLinear.apply(x, weight, self.bias, a, b, settings, norm)


class LoraConv2d(nn.Conv2d):
    """An ungrouped, undilated Conv2d whose low-rank update is in `lora`; made by `Adapters`, never constructed."""

    lora: LowRank
    weight = property(adapted_weight)

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, in, H, W] -> [B, out, H', W']."""
        if input.dim() == 3:  # without a batch, as nn.Conv2d takes it too
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, low, weight = input, self.lora, frozen_weight(self)
        dropout = low.dropout if self.training else 0.0
        a, b = low.acting()
        settings = _Settings(low.scale, low.pairs, dropout, _compute_dtype(x, weight))
        geometry = (self.stride, _padding(self))
        return _FusedConv2d.apply(x, weight, self.bias, a, b, settings, geometry)


class LoraMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention with a low-rank update of its q, k and v in `lora`; made by `Adapters`, never
    constructed.

    Its forward reads `in_proj_weight` once for the product, so W0 + s B A is made once per pass, and in float32: the
    one case in which LoRA costs the gradient of a full matrix.
    """

    lora: LowRank
    in_proj_weight = property(adapted_weight)


class LoraOutProjection(LoraLinear, NonDynamicallyQuantizableLinear):
    """The `out_proj` of an nn.MultiheadAttention, which reads it; made by `Adapters`, never constructed."""


class _Settings(NamedTuple):
    """What a fused step needs besides tensors."""

    scale: float
    pairs: list["_Pair"]
    dropout: float
    dtype: torch.dtype


class _Pair(NamedTuple):
    """Where one pair lives: its rows in y, its rows in the stacked A (columns of h), its rows in the stacked B."""

    rows: slice
    a: slice
    b: slice


def _pairs(rows: Rows, rank: int) -> list[_Pair]:
    pairs, b = [], 0
    for i, (start, stop) in enumerate(rows):
        height = stop - start
        pairs.append(_Pair(slice(start, stop), slice(i * rank, (i + 1) * rank), slice(b, b + height)))
        b += height
    return pairs


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on; otherwise that of x and the frozen weight, which must agree as they must
    for the layer alone."""
    if _autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise RuntimeError(f"the input is {x.dtype}, the frozen weight {weight.dtype}; cast one, or use autocast")
    return x.dtype


def _dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of x, [n, ...], are kept (int8, 0 or 1) and the factor that makes up for the dropped ones.

    Random bytes are compared with a threshold: on a CPU ten times as fast as `bernoulli_`, whose cost would exceed that
    of the low-rank path itself. 256 p is no whole number: each row takes the threshold above or below it at random, so
    that every element is dropped with probability p.
    """
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    noise = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
    rows = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device)
    threshold = (256 * p + rows).to(torch.uint8)
    # straight into int8, which becomes a float mask faster than bool does
    return torch.ge(noise, threshold, out=torch.empty_like(noise, dtype=torch.int8)), 1.0 / (1.0 - p)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype)


class _Normalised(NamedTuple):
    """How x came out of a LayerNorm, so that backward can do with what that LayerNorm keeps anyway.

    The input of `qkv` or `fc1` in a pre-norm block is the one full-size tensor that LoRA would keep and the frozen
    model would not: a tenth of the block's memory.
    """

    source: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def behind(x: Tensor) -> "_Normalised | None":
        # A compiler decides by itself what to make again. Under saved-tensor hooks (checkpointing, offloading) reading
        # what a node saved would run them, and a checkpointed block would be computed again right here.
        if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        node = x.grad_fn
        if node is None or node.name() != "NativeLayerNormBackward0" or len(node._saved_normalized_shape) != 1:
            return None
        if x._version:  # changed since, unseen by autograd
            return None
        return _Normalised(
            node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight, node._saved_bias
        )

    def product(self, left: Tensor) -> Tensor:
        """left [r, n] @ x [n, in], the normalisation applied to the short side instead of to x."""
        scaled, source = left * self.rstd.view(-1), self.source.reshape(-1, self.source.shape[-1])
        y = torch.addmm(scaled @ self.mean.view(-1, 1), scaled, source, beta=-1)
        if self.weight is not None:
            y *= self.weight
        return y if self.bias is None else y.addr_(left.sum(1), self.bias)

    def again(self) -> Tensor:
        """x itself, in three passes."""
        x = (self.source - self.mean).mul_(self.rstd)
        if self.weight is None:
            return x
        return x.mul_(self.weight) if self.bias is None else torch.addcmul(self.bias, x, self.weight, out=x)


class _FusedLinear(torch.autograd.Function):
    """y = x (W0 + s B A)^T + b, with h = s dropout(x) A^T for backward.

    s B A is summed into a passing copy of the weight, in the weight's own precision, and costs no pass over y; with
    dropout, and with weights stored in 16 bits, y += h B^T is added in place. Kept for backward: h and x, or
    what x is made from where a LayerNorm keeps that anyway; no other full-size tensor than y and dx is made. Products
    with the short side r are written transposed ([r, n] instead of [n, r]): BLAS libraries are up to four times faster
    on them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, settings, norm):
        dtype, pairs = settings.dtype, settings.pairs
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        with _without_autocast(x.device.type):
            # in 16 bits the sum would round a small update away
            fold = not settings.dropout and weight.dtype.itemsize >= 4
            w = (summed(weight, lora_A, lora_B, pairs, settings.scale) if fold else weight).to(dtype)
            y = F.linear(flat, w, None if bias is None else bias.to(dtype))
            mask, factor = _dropout_mask(flat, settings.dropout) if settings.dropout else (None, 1.0)
            h = _masked(flat, mask) @ (lora_A * (settings.scale * factor)).to(dtype).t()
            if not fold:
                b = lora_B.to(dtype)
                for pair in pairs:
                    y[:, pair.rows].addmm_(h[:, pair.a], b[pair.b].t())
        # the copy is kept only where a cast copy of the weight would be kept anyway
        ctx.fold, ctx.folded = fold, fold and dtype != weight.dtype
        ctx.save_for_backward(w if ctx.folded or not fold else weight, lora_A, lora_B, h, mask, *(norm or [flat]))
        ctx.settings, ctx.scale, ctx.x_dtype, ctx.x_shape = settings, settings.scale * factor, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # a view to autograd could not be changed in place by what follows, as in nn.ReLU(inplace=True)
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, lora_A, lora_B, h, mask, *kept = ctx.saved_tensors
        dtype, pairs = ctx.settings.dtype, ctx.settings.pairs
        with _without_autocast(h.device.type):
            dy = dy.to(dtype).reshape(-1, dy.shape[-1])
            dh_t, db = _low_gradients(dy, lora_B.to(dtype), h, pairs)
            if len(kept) == 1:
                da = dh_t @ _masked(kept[0], mask)
            elif mask is None and dtype.itemsize >= 4:  # in fewer bits the difference of two sums would be lost
                da = _Normalised(*kept).product(dh_t)
            else:
                da = dh_t @ _masked(_Normalised(*kept).again().to(dtype).reshape(-1, ctx.x_shape[-1]), mask)
            dx = None
            if ctx.needs_input_grad[0]:
                # one more sum of a small weight costs less than a pass over dx
                anew = ctx.fold and not ctx.folded and 2 * w.numel() <= len(dy) * w.shape[1]
                dx = dy @ (summed(w, lora_A, lora_B, pairs, ctx.scale) if anew else w)
                if not (anew or ctx.folded):
                    a = (lora_A * ctx.scale).to(dtype)
                    dx = dx.addmm_(dh_t.t(), a) if mask is None else dx.addcmul_(dh_t.t() @ a, mask.to(dtype))
                dx = dx.view(ctx.x_shape).to(ctx.x_dtype)
            dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da.to(lora_A.dtype).mul_(ctx.scale), db.to(lora_B.dtype), None, None


def _low_gradients(dy: Tensor, b: Tensor, h: Tensor, pairs: list[_Pair]) -> tuple[Tensor, Tensor]:
    """(dy b)^T, [pairs * r, n], and dy^T h, [sum of rows, r], pair by pair, from dy [n, out], b [sum of rows, r] and
    h [n, pairs * r]."""
    dh_t, db = [], []
    for pair in pairs:
        part, its_b, its_h_t = dy[:, pair.rows], b[pair.b], h[:, pair.a].t()
        if dy.device.type == "cpu" and dy.dtype.itemsize >= 4:  # BLAS libraries want the short operands by rows
            dh_t.append(F.linear(part, its_b.t().contiguous()).t().contiguous())
            db.append((its_h_t.contiguous() @ part).t())
        else:
            dh_t.append(its_b.t() @ part.t())
            db.append((its_h_t @ part).t())
    return (dh_t[0], db[0]) if len(pairs) == 1 else (torch.cat(dh_t), torch.cat(db))


class _FusedConv2d(torch.autograd.Function):
    """The same for a convolution: h = conv(dropout(x), A) with the layer's geometry, y += s * (1x1 convolution of h
    by B)."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, settings, geometry):
        dtype = settings.dtype
        stride, padding = geometry
        x_c = x.to(dtype)
        with _without_autocast(x.device.type):
            w = weight.to(dtype)
            y = F.conv2d(x_c, w, None if bias is None else bias.to(dtype), stride, padding)
            mask, factor = _dropout_mask(x_c, settings.dropout) if settings.dropout else (None, 1.0)
            h = F.conv2d(_masked(x_c, mask), lora_A.to(dtype) * factor, None, stride, padding)
            b = lora_B.to(dtype).flatten(1)
            for pair in settings.pairs:
                y[:, pair.rows] += torch.einsum("or,brhw->bohw", b[pair.b] * settings.scale, h[:, pair.a])
        ctx.save_for_backward(w, lora_A, lora_B, h, mask, x_c)
        ctx.settings, ctx.factor, ctx.geometry, ctx.x_dtype = settings, factor, geometry, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, lora_A, lora_B, h, mask, x = ctx.saved_tensors
        settings, dtype, s = ctx.settings, ctx.settings.dtype, ctx.settings.scale
        dy = dy.to(dtype)
        b = lora_B.to(dtype).flatten(1)
        with _without_autocast(x.device.type):
            db = torch.empty_like(lora_B)
            dh = torch.empty_like(h)
            for pair in settings.pairs:
                part = dy[:, pair.rows]
                dh[:, pair.a] = torch.einsum("or,bohw->brhw", b[pair.b] * s, part)
                db[pair.b] = torch.einsum("bohw,brhw->or", part, h[:, pair.a]).mul(s)[:, :, None, None]
            dbias = dy.sum((0, 2, 3)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            dh.mul_(ctx.factor)
            dx = None
            dx_low, da = _conv_grads(
                dh, _masked(x, mask), lora_A.to(dtype), ctx.geometry, ctx.needs_input_grad[0], True
            )
            if ctx.needs_input_grad[0]:
                dx, _ = _conv_grads(dy, x, w, ctx.geometry, True, False)
                dx = dx.add_(_masked(dx_low, mask)).to(ctx.x_dtype)
        return dx, None, dbias, da.to(lora_A.dtype), db, None, None


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side, as a number where the layer says "same" or "valid"."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple((k - 1) // 2 for k in layer.kernel_size)
    return layer.padding


def _conv_grads(dy: Tensor, x: Tensor, weight: Tensor, geometry: tuple, want_dx: bool, want_dw: bool):
    stride, padding = geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [want_dx, want_dw, False]
    )
    return dx, dw
