"""LoRA on narrow layers and short inputs, made of stock operators.

A function of one's own runs its backward pass in Python, for a tenth of a millisecond or two. Where the products of a
layer take little longer than that, operators that autograd knows are faster, although they compute more:

A narrow layer computes with the sum W0 + s B A, and autograd makes the gradient of that whole weight, and of it
dA = s * B^T dW and dB = s * dW A^T. At rank r four products with a short side r (A x, and the gradients of A x, B and
A) would take the place of the one for dW. BLAS libraries run them at a quarter of their speed or less: on a UNet's
layer of 64 to 128 channels the one wide product is as fast as the four. So it is in 1x1 convolutions; in larger ones
the products with A are wide themselves.

With a short input the weight is the larger part of the work, and the formula is computed as it is written: what that
takes beside the frozen layer, on the output and on the gradient of the input, goes through tensors that are small.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vislora.lora.low_rank import Pair


def is_narrow(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether one product as large as the weight, [out, in] or [out, in, 1, 1], takes no longer than those of A and B;
    never for weights stored in 16 bits, which hold no sum with a small update."""
    return weight.dtype.itemsize >= 4 and weight.numel() <= 8 * (lora_A.numel() + lora_B.numel())


def is_short(x: Tensor, weight: Tensor) -> bool:
    """Whether one pass over y and one over dx, for x [..., in], cost less than two over the weight, [out, in] or [out,
    in, kh, kw]."""
    return x.numel() // x.shape[-1] * sum(weight.shape[:2]) <= 2 * weight.numel()


def summed(weight: Tensor, lora_A: Tensor, lora_B: Tensor, pairs: Sequence[Pair], scale: float) -> Tensor:
    """W0 + s B A in W0's dtype and form, differentiable; a convolution's as well."""
    a, b = cast(lora_A, weight.dtype), cast(lora_B, weight.dtype)
    w = weight.clone(memory_format=torch.contiguous_format)
    if weight.dim() > 2:
        a, b, w = a.flatten(1), b.flatten(1), w.flatten(1)
    # in place, because autocast leaves that as it is: it would take torch.addmm to 16 bits
    if len(pairs) == 1 and len(b) == len(w):
        w.addmm_(b, a, alpha=scale)
    else:
        for rows, of_a, of_b in pairs:
            w[rows].addmm_(b[of_b], a[of_a], alpha=scale)
    return w.view(weight.shape)


def added(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, pairs: Sequence[Pair], scale: float
) -> Tensor:
    """x W0^T + b + s (x A^T) B^T for x [n, in], in the dtype of x."""
    y = F.linear(x, weight, bias)
    h, b = F.linear(x, cast(lora_A, x.dtype)), cast(lora_B, x.dtype)
    if len(pairs) == 1 and len(b) == y.shape[1]:
        return y.addmm_(h, b.t(), alpha=scale)
    for rows, of_a, of_b in pairs:
        y[:, rows].addmm_(h[:, of_a], b[of_b].t(), alpha=scale)
    return y


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), but at once where there is nothing to do: torch takes ten microseconds to find that out with cold
    caches, as between two large products."""
    return x if x.dtype == dtype else x.to(dtype)
