"""LoRA on layers so narrow that the gradient of the whole weight costs no more than those of A and B.

At rank r four products with a short side r (A x, and the gradients of A x, B and A) take the place of one that is as
wide as the layer. BLAS libraries run the short ones at a quarter of their speed or less: on a UNet's layer of 64 to 128
channels the one wide product is as fast as the four, in half the calls. So the layer computes with the sum W0 + s B A,
and autograd makes dW, and of it dA = s * B^T dW and dB = s * dW A^T. A function of its own, whose backward pass is
Python, would cost these layers another hundredth or two.
"""

from collections.abc import Sequence

from torch import Tensor


def is_narrow(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether one product as large as the weight, [out, in], takes no longer than those of A and B; never for weights
    stored in 16 bits, which hold no sum with a small update."""
    return weight.dtype.itemsize >= 4 and weight.numel() <= 8 * (lora_A.numel() + lora_B.numel())


def summed(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, pairs: Sequence[tuple[slice, slice, slice]], scale: float
) -> Tensor:
    """W0 + s B A in W0's dtype, differentiable; `pairs` are (rows of W0, rows of A, rows of B)."""
    a, b = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    # in place, because autocast leaves that as it is: it would take torch.addmm to 16 bits
    w = weight.detach().clone()
    if len(pairs) == 1 and len(b) == len(w):
        return w.addmm_(b, a, alpha=scale)
    for rows, of_a, of_b in pairs:
        w[rows].addmm_(b[of_b], a[of_a], alpha=scale)
    return w
