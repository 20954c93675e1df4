"""DoRA on Linear and Conv2d: the length and the direction of each output row are trained apart.

DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) gives row i of the adapted weight a trained length m_i:

    y = g * (W0 x + s * B (A x)) + b,    g_i = m_i / ||W0 + s B A||_i

The norm is a constant for the gradient (section 4.3). m starts at ||W0||, so that an untrained adapter changes nothing.
With dropout the frozen product of the extra term sees the dropped input too, as in the paper's code and in PEFT:

    y = W0 x + b + (g - 1) * W0 dropout(x) + g * s * B (A dropout(x))

The magnitude belongs to the rows that a pair writes: of a fused `qkv` adapted in q and v, k stays as it is. A row of
W0 that is all zero has no direction; it stays zero.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.lora.fused import Normalised, Settings, compute_dtype, dropout_mask, gradient_of_A, low_gradients, masked
from vislora.lora.layers import LoraConv2d, LoraLinear
from vislora.lora.low_rank import TINY, LowRank, row_norms
from vislora.lora.reads import frozen_weight, summed_weight, transformed, without_autocast
from vislora.lora.small import cast, summed


class DoraLinear(LoraLinear):
    """A Linear with DoRA whose trained part is in `lora`; made by `Adapters`, never constructed."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in] -> [..., out]."""
        x, low, weight = input, self.lora, frozen_weight(self)
        if transformed():
            return F.linear(x, summed_weight(self), self.bias)
        dtype = compute_dtype(x, weight)
        if low.dropout and self.training:
            y = _spelled_out(self, x.reshape(-1, x.shape[-1]), dtype, F.linear)
            return y.view(*x.shape[:-1], y.shape[-1])
        settings, magnitude = Settings(low.scale, low.pairs, 0.0, dtype), low.acting_magnitudes(weight)
        return FoldedLinear.apply(
            x, weight, self.bias, low.lora_A, low.lora_B, magnitude, settings, Normalised.behind(x)
        )


class DoraConv2d(LoraConv2d):
    """A Conv2d with DoRA whose trained part is in `lora`; made by `Adapters`, never constructed."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, in, H, W] -> [B, out, H', W']."""
        return _spelled_out(
            self, input, compute_dtype(input, frozen_weight(self)), lambda x, w: self._conv_forward(x, w, None)
        )


class DoraOutProjection(DoraLinear, NonDynamicallyQuantizableLinear):
    """The `out_proj` of an nn.MultiheadAttention, which reads it; made by `Adapters`, never constructed."""


def _spelled_out(layer: DoraLinear | DoraConv2d, x: Tensor, dtype: torch.dtype, project: Callable) -> Tensor:
    """The formula as it stands, by autograd; `project(x, weight)` is the layer's own operation without bias."""
    low, weight = layer.lora, frozen_weight(layer)
    along = (-1,) + (1,) * (weight.dim() - 2)  # y's axis of channels
    with without_autocast(x):
        x, w, a = x.to(dtype), weight.to(dtype), low.lora_A.to(dtype)
        b = low.wide_B(w.shape[0]).to(dtype)
        if weight.dim() == 4:
            b = b[:, :, None, None]
        gain = row_gain(low, weight).view(along)
        plain = project(x, w)
        if low.dropout and layer.training:
            mask, factor = dropout_mask(x, low.dropout)
            dropped = masked(x, mask) * factor
            frozen = project(dropped, w)
            offset = plain - frozen
        else:
            dropped, frozen, offset = x, plain, None
        up = F.conv2d if weight.dim() == 4 else F.linear
        adapted = frozen + low.scale * up(project(dropped, a), b)
        y = gain * adapted
        if offset is not None:
            y = y + offset
        if layer.bias is not None:
            y = y + layer.bias.view(along)
        return y.to(dtype)


def row_gain(low: LowRank, weight: Tensor) -> Tensor:
    """g, the factor on each output row of W0 + s B A, [out], differentiable in the magnitude."""
    return low.acting_magnitudes(weight) / _norm(low, weight).clamp_min(TINY)


@torch.no_grad()
def _norm(low: LowRank, weight: Tensor) -> Tensor:
    """||W0 + s B A|| of each row, [out], without that matrix:
    ||W0||^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>, row by row."""
    a, b = low.lora_A.flatten(1), low.wide_B(weight.shape[0])
    cross = weight.to(a.dtype).flatten(1) @ a.t()
    squared = row_norms(weight) ** 2 + ((2 * low.scale * cross + low.scale**2 * (b @ (a @ a.t()))) * b).sum(1)
    return squared.clamp_min(0.0).sqrt()


class FoldedLinear(torch.autograd.Function):
    """y = W x + b with W = g * (W0 + s B A) made anew each step, in float32 and rounded once: where there are more
    tokens than channels, that is cheaper than any pass over y.

    Backward needs no product of W's size but the one that gives dx: with h = A x, dB = s g * dy^T h, dA from
    dh = s (g B)^T dy; and since g * (W0 + s B A) x = y - b, dm = sum over tokens of dy * (y - b), over m. y is
    kept for it (attention and activations keep theirs anyway), and made again where it was changed in place.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, settings, norm):
        dtype = settings.dtype
        flat = cast(x, dtype).reshape(-1, x.shape[-1])
        w = _summed(weight, lora_A, lora_B, settings)
        gain = magnitude / row_norms(w).clamp_min(TINY)
        w = cast(w.mul_(gain[:, None]), dtype)
        y = F.linear(flat, w, None if bias is None else cast(bias, dtype))
        h = flat @ cast(lora_A, dtype).t()
        # W is kept only where a cast copy of the frozen weight would be kept anyway; else it is made again
        ctx.again = dtype == weight.dtype
        ctx.save_for_backward(
            weight if ctx.again else w, bias, lora_A, lora_B, magnitude, gain, h, y, *(norm or [flat])
        )
        ctx.settings, ctx.x_dtype, ctx.x_shape = settings, x.dtype, x.shape
        # no view to autograd, as in `FusedLinear`
        y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
        # a compiler's tensors are never changed in place
        ctx.witness = None if torch.compiler.is_compiling() else _witness(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, bias, lora_A, lora_B, magnitude, gain, h, y, *kept = ctx.saved_tensors
        settings, dtype = ctx.settings, ctx.settings.dtype
        changed = ctx.witness is not None and ctx.witness._version > 0
        with without_autocast(y):
            dy = cast(dy, dtype).reshape(-1, dy.shape[-1])
            factor = settings.scale * torch.cat([gain[pair.rows] for pair in settings.pairs])[:, None]
            dh, db = low_gradients(dy, cast(lora_B * factor, dtype), h, settings.pairs, 1.0)
            db = db * factor
            da = gradient_of_A(dh, kept, None, 1.0)
            if ctx.again and (changed or ctx.needs_input_grad[0]):
                w = cast(_summed(w, lora_A, lora_B, settings).mul_(gain[:, None]), dtype)
            if changed:
                x = kept[0] if len(kept) == 1 else cast(Normalised(*kept).again(), dtype)
                y = F.linear(x.reshape(-1, ctx.x_shape[-1]), w, None if bias is None else cast(bias, dtype))
            dm = _column_products(dy, y, bias, gain.dtype)
            dm = torch.where(magnitude == 0, 0.0, dm / magnitude)
            dbias = dy.sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
            dx = cast((dy @ w).view(ctx.x_shape), ctx.x_dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dbias, cast(da, lora_A.dtype), db, dm, None, None


def _witness(y: Tensor) -> Tensor:
    """A tensor without elements that counts, as its version, the changes of y in place, and doesn't keep y alive."""
    witness = y.detach()
    witness.data = y.new_empty(0)
    return witness


def _summed(weight: Tensor, lora_A: Tensor, lora_B: Tensor, settings: Settings) -> Tensor:
    """W0 + s B A, a new tensor in float32 or wider."""
    wide = cast(weight, torch.promote_types(weight.dtype, torch.float32))
    return summed(wide, lora_A, lora_B, settings.pairs, settings.scale)


def _column_products(dy: Tensor, y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(dy * (y - bias)).sum(0) of [n, out] tensors, summed in `dtype`; in slices, which on a CPU stay in its cache (a
    fresh full-size product costs ten times the arithmetic in page faults) and take little of a GPU's memory."""
    rows = max(1, min(len(dy), 128 if dy.device.type == "cpu" else 8192))
    sums = dy.new_zeros(rows, dy.shape[1], dtype=dtype)
    for part, its in zip(dy.split(rows), y.split(rows), strict=True):
        its = its.to(dtype) if bias is None else its - bias.to(dtype)
        sums[: len(part)].addcmul_(part.to(dtype), its)
    return sums.sum(0)
