"""LoRA on layers so narrow that the gradient of the whole weight costs no more than those of A and B.

At rank r four products with a short side r (A x, and the gradients of A x, B and A) take the place of one that is as
wide as the layer. BLAS libraries run the short ones at a quarter of their speed or less: on a UNet's layer of 64 to 128
channels the one wide product is as fast as the four, in half the calls. So dW is made, and

    dA = s * B^T dW,    dB = s * dW A^T.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def is_narrow(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether one product as large as the weight, [out, in], takes no longer than those of A and B; never for weights
    stored in 16 bits, which hold no sum with a small update."""
    return weight.dtype.itemsize >= 4 and weight.numel() <= 8 * (lora_A.numel() + lora_B.numel())


class NarrowLinear(torch.autograd.Function):
    """y = x W^T + b with W = W0 + s B A, summed in W0's dtype; kept for backward are x and W.

    `pairs` are (rows of y, rows of A, rows of B) as slices. Products of the weight's size are written in place or with
    `out`, which autocast leaves as they are.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, pairs, scale, dtype):
        w = weight.clone()
        for part, a, b in _by_pair(pairs, w, lora_A, lora_B):
            part.addmm_(b, a, alpha=scale)
        w, flat = w.to(dtype), x.to(dtype).reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, w, lora_A, lora_B)
        ctx.pairs, ctx.scale, ctx.x_dtype, ctx.x_shape = pairs, scale, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(flat, w, None if bias is None else bias.to(dtype)).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        flat, w, lora_A, lora_B = ctx.saved_tensors
        dy = dy.to(w.dtype).reshape(-1, w.shape[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, w, out=torch.empty_like(flat)).view(ctx.x_shape).to(ctx.x_dtype)
        dw = torch.mm(dy.t(), flat, out=torch.empty_like(w)).to(lora_A.dtype)
        da, db = torch.empty_like(lora_A), torch.empty_like(lora_B)
        trained, gradients = (_by_pair(ctx.pairs, dw, *both) for both in ((lora_A, lora_B), (da, db)))
        for (part, a, b), (_, pair_da, pair_db) in zip(trained, gradients, strict=True):
            pair_da.addmm_(b.t(), part, beta=0, alpha=ctx.scale)  # beta=0: the product alone
            pair_db.addmm_(part, a.t(), beta=0, alpha=ctx.scale)
        dbias = dy.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da, db, None, None, None


def _by_pair(pairs: Sequence[tuple[slice, slice, slice]], wide: Tensor, lora_A: Tensor, lora_B: Tensor) -> list:
    """Each pair's rows of a tensor of the weight's size, its A and its B; no views are made where there is but one."""
    if len(pairs) == 1 and len(lora_B) == len(wide):
        return [(wide, lora_A, lora_B)]
    return [(wide[rows], lora_A[a], lora_B[b]) for rows, a, b in pairs]
