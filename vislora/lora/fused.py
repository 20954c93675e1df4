"""LoRA on Linear and Conv2d as one autograd step each, over frozen weights."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.low_rank import Pair
from vislora.lora.reads import autocasts, without_autocast
from vislora.lora.small import cast, summed


class Settings(NamedTuple):
    """What a fused step needs besides tensors."""

    scale: float
    pairs: list[Pair]
    dropout: float
    dtype: torch.dtype


class FusedLinear(torch.autograd.Function):
    """y = x (W0 + s B A)^T + b, with h = dropout(x) A^T for backward.

    s B A is summed into a passing copy of the weight, in the weight's own precision, and costs no pass over y; with
    dropout, and with weights stored in 16 bits, y += s h B^T is added in place. Kept for backward: h and x, or
    what x is made from where a LayerNorm keeps that anyway; no other full-size tensor than y and dx is made. Nothing
    is to be switched off for autocast in forward, where all products have its dtype already.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, settings, norm):
        dtype, pairs, scale = settings.dtype, settings.pairs, settings.scale
        flat = cast(x, dtype).reshape(-1, x.shape[-1])
        # in 16 bits the sum would round a small update away
        fold = not settings.dropout and weight.dtype.itemsize >= 4
        w = cast(summed(weight, lora_A, lora_B, pairs, scale) if fold else weight, dtype)
        y = F.linear(flat, w, None if bias is None else cast(bias, dtype))
        mask = None
        if settings.dropout:
            mask, factor = dropout_mask(flat, settings.dropout)
            scale *= factor
        h = masked(flat, mask) @ cast(lora_A, dtype).t()
        if not fold:
            b = cast(lora_B, dtype)
            for pair in pairs:
                y[:, pair.rows].addmm_(h[:, pair.a], b[pair.b].t(), alpha=scale)
        # the copy is kept only where a cast copy of the weight would be kept anyway
        ctx.fold, ctx.folded = fold, fold and dtype != weight.dtype
        ctx.save_for_backward(w if ctx.folded or not fold else weight, lora_A, lora_B, h, mask, *(norm or [flat]))
        ctx.settings, ctx.scale, ctx.x_dtype, ctx.x_shape = settings, scale, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # a view to autograd could not be changed in place by what follows, as in nn.ReLU(inplace=True)
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, lora_A, lora_B, h, mask, *kept = ctx.saved_tensors
        dtype, pairs, scale = ctx.settings.dtype, ctx.settings.pairs, ctx.scale
        with without_autocast(h):
            dy = cast(dy, dtype).reshape(-1, dy.shape[-1])
            dh, db = low_gradients(dy, cast(lora_B, dtype), h, pairs, scale)
            da = gradient_of_A(dh, kept, mask, scale)
            dx = None
            if ctx.needs_input_grad[0]:
                # one more sum of a small weight costs less than a pass over dx
                anew = ctx.fold and not ctx.folded and 2 * w.numel() <= len(dy) * w.shape[1]
                dx = dy @ (summed(w, lora_A, lora_B, pairs, scale) if anew else w)
                if mask is not None:
                    dx.addcmul_(dh @ cast(lora_A, dtype), mask, value=scale)
                elif not (anew or ctx.folded):
                    dx.addmm_(dh, cast(lora_A, dtype), alpha=scale)
                dx = cast(dx.view(ctx.x_shape), ctx.x_dtype)
            dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, cast(da, lora_A.dtype), cast(db, lora_B.dtype), None, None


class FusedConv2d(torch.autograd.Function):
    """The same for a convolution: h = conv(dropout(x), A) with the layer's geometry, and B is a 1x1 convolution,
    computed as a product for each sample. With `fold` s B A is summed into the weight, which saves a pass over y and a
    second convolution on the way to dx. For few pixels it costs more than that, as the weight is the larger part."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, settings, geometry, fold):
        dtype, pairs, scale = settings.dtype, settings.pairs, settings.scale
        x_c = cast(x, dtype)
        w = cast(summed(weight, lora_A, lora_B, pairs, scale) if fold else weight, dtype)
        y = F.conv2d(x_c, w, None if bias is None else cast(bias, dtype), *geometry)
        mask = None
        if settings.dropout:
            mask, factor = dropout_mask(x_c, settings.dropout)
            scale *= factor
        h = F.conv2d(masked(x_c, mask), cast(lora_A, dtype), None, *geometry)
        if not fold:
            b = cast(lora_B, dtype).flatten(1).expand(x.shape[0], -1, -1)
            pixels = y.flatten(2)  # a view, also where channels come last
            for pair in pairs:
                pixels[:, pair.rows].baddbmm_(b[:, pair.b], h.flatten(2)[:, pair.a], alpha=scale)
        ctx.fold, ctx.folded = fold, fold and dtype != weight.dtype
        ctx.save_for_backward(w if ctx.folded or not fold else weight, lora_A, lora_B, h, mask, x_c)
        ctx.settings, ctx.scale, ctx.geometry, ctx.x_dtype = settings, scale, geometry, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, lora_A, lora_B, h, mask, x = ctx.saved_tensors
        dtype, pairs, scale = ctx.settings.dtype, ctx.settings.pairs, ctx.scale
        with without_autocast(x):
            dy, a, b_t = cast(dy, dtype), cast(lora_A, dtype), cast(lora_B, dtype).flatten(1).t()
            pixels, dh, db = dy.flatten(2), [], []
            for pair in pairs:
                part = pixels[:, pair.rows]
                dh.append(torch.bmm(b_t[:, pair.b].expand(dy.shape[0], -1, -1), part))
                db.append(torch.bmm(h.flatten(2)[:, pair.a], part.mT).sum(0).mul_(scale).t())
            dh, db = torch.cat(dh, 1).view(h.shape), torch.cat(db).view(lora_B.shape)
            dbias = dy.sum((0, 2, 3)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            want_dx = ctx.needs_input_grad[0]
            dx_low, da = _conv_grads(dh, masked(x, mask), a, ctx.geometry, want_dx and not ctx.fold, True)
            dx = None
            if want_dx:
                anew = ctx.fold and not ctx.folded
                w = summed(w, lora_A, lora_B, pairs, scale) if anew else w
                dx, _ = _conv_grads(dy, x, w, ctx.geometry, True, False)
                dx = cast(dx if ctx.fold else dx.add_(masked(dx_low, mask), alpha=scale), ctx.x_dtype)
        return dx, None, dbias, cast(da, lora_A.dtype).mul_(scale), cast(db, lora_B.dtype), None, None, None


class Normalised(NamedTuple):
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
    def behind(x: Tensor) -> "Normalised | None":
        """How x came about; None where no LayerNorm over the last dimension made it, or what it saved can't be read."""
        # A compiler decides by itself what to make again. Under saved-tensor hooks (checkpointing, offloading) reading
        # what a node saved would run them, and a checkpointed block would be computed again right here.
        if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        node = x.grad_fn
        if node is None or type(node).__name__ != "NativeLayerNormBackward0" or len(node._saved_normalized_shape) != 1:
            return None
        if x._version:  # changed since, unseen by autograd
            return None
        # a CPU keeps the statistics of a model in 16 bits as rounded, by which x far from zero would lose its digits
        if node._saved_result1.dtype.itemsize < 4:
            return None
        return Normalised(
            node._saved_input, node._saved_result1, node._saved_result2, node._saved_weight, node._saved_bias
        )

    def row_sums(self, left: Tensor, scale: float) -> Tensor:
        """scale * left^T x, [r, in], for left [n, r]; the normalisation is applied to left instead of to x."""
        scaled = left * self.rstd.view(-1, 1)
        y = row_sums(scaled, self.source.reshape(-1, self.source.shape[-1]), scale)
        y -= (scaled.t() @ self.mean.view(-1, 1)).mul_(scale)
        if self.weight is not None:
            y *= self.weight
        return y if self.bias is None else y.addr_(left.sum(0), self.bias, alpha=scale)

    def again(self) -> Tensor:
        """x itself, in three passes."""
        x = (self.source - self.mean).mul_(self.rstd)
        if self.weight is None:
            return x
        return x.mul_(self.weight) if self.bias is None else torch.addcmul(self.bias, x, self.weight, out=x)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, which leaves float64 alone; otherwise that of x and the frozen weight,
    which must agree as they must for the layer alone.

    Raises:
        AdapterError: the weight isn't frozen.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise AdapterError(
            f"the {list(weight.shape)} weight of an adapted layer requires a gradient, which isn't computed "
            "beside an adapter; freeze it, or train the layer in full instead of adapting it"
        )
    if autocasts(x) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise RuntimeError(f"the input is {x.dtype}, the frozen weight {weight.dtype}; cast one, or use autocast")
    return x.dtype


def dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of x, [n, ...], are kept (int8, 0 or 1) and the factor that makes up for the dropped ones.

    Random bytes are compared with a threshold: on a CPU ten times as fast as `bernoulli_`, whose cost would exceed that
    of the low-rank path itself. 256 p is no whole number: each row takes the threshold above or below it at random, so
    that every element is dropped with probability p.
    """
    count = (x.numel() + 7) // 8
    if torch.compiler.is_compiling():  # which can't trace the faster way
        words = torch.randint(-(2**63), 2**63 - 1, (count,), device=x.device)
    else:
        words = torch.empty(count, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    noise = words.view(torch.uint8)[: x.numel()].view(x.shape)
    rows = torch.empty(x.shape[0], *[1] * (x.dim() - 1), device=x.device)
    threshold = rows.uniform_(256 * p, 256 * p + 1).to(torch.uint8)
    # straight into int8, by which floats are multiplied faster than by bool
    return torch.ge(noise, threshold, out=torch.empty_like(noise, dtype=torch.int8)), 1.0 / (1.0 - p)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with the dropped elements at zero; the factor that makes up for them is the caller's."""
    return x if mask is None else x * mask


def gradient_of_A(dh: Tensor, kept: list[Tensor], mask: Tensor | None, scale: float) -> Tensor:
    """scale * dh^T dropout(x), [r, in], from dh [n, r] and what is kept of x: itself, [n, in], or a `Normalised`'s."""
    if len(kept) == 1:
        return row_sums(dh, masked(kept[0], mask), scale)
    norm = Normalised(*kept)
    if mask is None and norm.source.dtype.itemsize >= 4:  # in fewer bits the difference of two sums would be lost
        return norm.row_sums(cast(dh, norm.source.dtype), scale)
    x = cast(norm.again(), dh.dtype)
    return row_sums(dh, masked(x.reshape(-1, x.shape[-1]), mask), scale)


def low_gradients(dy: Tensor, b: Tensor, h: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    """dy b, [n, pairs * r], and scale * dy^T h, [sum of rows, r], pair by pair, from dy [n, out], b [sum of rows, r]
    and h [n, pairs * r]."""
    if len(pairs) == 1 and len(b) == dy.shape[1]:
        return _short(dy, b), row_sums(h, dy, scale).t()
    dh = [_short(dy[:, pair.rows], b[pair.b]) for pair in pairs]
    db = [row_sums(h[:, pair.a], dy[:, pair.rows], scale).t() for pair in pairs]
    return torch.cat(dh, 1), torch.cat(db)


def _short(dy: Tensor, b: Tensor) -> Tensor:
    """dy b, [n, r]."""
    if dy.is_cpu and dy.dtype.itemsize >= 4:  # BLAS libraries are up to three times faster with b by rows
        return F.linear(dy, b.t().contiguous())
    return dy @ b


def row_sums(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left^T right, [r, m], for left [n, r] and right [n, m].

    BLAS libraries have one thread of a CPU compute what is so narrow, unless they get it in slices.
    """
    slices = 1
    if right.is_cpu and right.dtype.itemsize >= 4 and not torch.compiler.is_compiling():
        threads = torch.get_num_threads()
        slices = math.gcd(len(right), 2 * threads) if threads > 1 else 1
    if slices == 1:
        return (left.t() @ right).mul_(scale)
    left, right = (m.unflatten(0, (slices, len(m) // slices)) for m in (left, right))
    return torch.bmm(left.mT, right).sum(0).mul_(scale)


def explicit_padding(layer: nn.Conv2d) -> tuple[int, ...]:
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
