"""LoRA on Linear and Conv2d: the classes that adapted layers take.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) adds a trained low-rank product to a frozen projection:

    y = W0 x + b + s * B (A dropout(x)),    A: [r, in],  B: [out, r],  s = alpha / r

or s = alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

A layer becomes adaptable by changing its class in place (`nn.Linear` -> `LoraLinear`): the module stays the same
object, with its parameters, hooks and state-dict keys, and goes back to its old class when the adapter is removed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vislora.lora.fused import FusedConv2d, FusedLinear, Normalised, Settings, compute_dtype, explicit_padding
from vislora.lora.low_rank import LowRank
from vislora.lora.reads import adapted_weight, frozen_weight, summed_weight, transformed
from vislora.lora.small import added, is_narrow, is_short, summed


class LoraLinear(nn.Linear):
    """A Linear whose low-rank update is in `lora`; made by `Adapters`, never constructed.

    It acts in the layer's own forward, and in `weight` for a model that reads that instead.
    """

    lora: LowRank
    weight = property(adapted_weight)

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name for it, which some models call it by
        """input: [..., in] -> [..., out]."""
        x, low, weight = input, self.lora, frozen_weight(self)
        if transformed():
            return F.linear(x, summed_weight(self), self.bias)
        dropout = low.dropout if self.training else 0.0
        a, b = low.acting()
        settings = Settings(low.scale, low.pairs, dropout, compute_dtype(x, weight))
        narrow = not dropout and is_narrow(weight, a, b)
        # a compiler would tie its program to the number of tokens
        if not (dropout or narrow or torch.compiler.is_compiling()) and is_short(x, weight):
            flat = x.to(settings.dtype).reshape(-1, x.shape[-1])
            y = added(flat, weight, self.bias, a, b, low.pairs, low.scale)
            return y.view(*x.shape[:-1], y.shape[-1])
        forward_alone = not (dropout or torch.is_grad_enabled())  # h is for backward
        if narrow or (forward_alone and weight.dtype.itemsize >= 4):
            return F.linear(x, summed(weight, a, b, low.pairs, low.scale), self.bias)
        return FusedLinear.apply(x, weight, self.bias, a, b, settings, Normalised.behind(x))


class LoraConv2d(nn.Conv2d):
    """An ungrouped, undilated Conv2d whose low-rank update is in `lora`; made by `Adapters`, never constructed."""

    lora: LowRank
    weight = property(adapted_weight)

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Conv2d:
        # PEFT makes its own layers of the class of the one that it wraps; a copy is begun without arguments
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, in, H, W] -> [B, out, H', W']."""
        if input.dim() == 3:  # without a batch, as nn.Conv2d takes it too
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, low, weight = input, self.lora, frozen_weight(self)
        if transformed():
            return self._conv_forward(x, summed_weight(self), self.bias)
        dropout = low.dropout if self.training else 0.0
        a, b = low.acting()
        settings = Settings(low.scale, low.pairs, dropout, compute_dtype(x, weight))
        narrow = not dropout and self.kernel_size == (1, 1) and is_narrow(weight, a, b)
        short = torch.compiler.is_compiling() or is_short(x.movedim(1, -1), weight)
        fold = not (dropout or short) and weight.dtype.itemsize >= 4
        if narrow or (fold and not torch.is_grad_enabled()):
            return self._conv_forward(x, summed(weight, a, b, low.pairs, low.scale), self.bias)
        geometry = (self.stride, explicit_padding(self))
        return FusedConv2d.apply(x, weight, self.bias, a, b, settings, geometry, fold)


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


def opaque_class(plain: type[nn.Linear]) -> type[nn.Linear]:
    """A class for Linears whose product is the affair of their own class, or of a quantised weight: it adds the
    low-rank update in `lora` to what that gives."""

    def forward(self: nn.Linear, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: [..., in] -> [..., out]."""
        y, low = plain.forward(self, input, *args, **kwargs), self.lora
        a, b = low.acting()[0].to(y.dtype), low.wide_B(y.shape[-1]).to(y.dtype)
        h = F.linear(F.dropout(input.to(y.dtype), low.dropout, self.training), a)
        return y + low.scale * F.linear(h, b)

    # of one base: an object can't change to a class with another one before its own
    return type(f"Lora{plain.__name__}", (plain,), {"forward": forward})
