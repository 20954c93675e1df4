"""PiSSA: start from the principal part of the frozen weight, and train that.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) splits W0 = U S V^T by its largest r singular values:

    s * B0 A0 = U_r S_r V_r^T,    y = (W0 - s * B0 A0) x + s * B A x + b,    A and B starting at A0 and B0

The residual isn't stored in W0's place: the layer computes W0 x + s * (B A - B0 A0) x, a pair of twice the rank half of
which is frozen. So the base stays what it is for every other adapter, an untrained adapter changes nothing, and what is
exported is a plain LoRA of rank 2r on the original weights, [A; A0] and [B, -B0].
"""

import torch
from torch import Tensor

from vislora.errors import AdapterError


@torch.no_grad()
def principal_pair(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 and B0, float32, with s * B0 A0 the best approximation of rank r of the weight.

    Args:
        weight: [out, in] or [out, in, kh, kw].
        rank: r.
        scale: s.

    Returns:
        A0 [r, in] or [r, in, kh, kw], and B0 [out, r] or [out, r, 1, 1].

    Raises:
        AdapterError: the weight has fewer singular values than the rank.
    """
    matrix = weight.float().flatten(1)
    if rank > min(matrix.shape):
        raise AdapterError(
            f"PiSSA of rank {rank} needs as many singular values; a {matrix.shape[0]} x {matrix.shape[1]} weight has "
            f"{min(matrix.shape)}"
        )
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    return a.view(rank, *weight.shape[1:]), b.view(*b.shape, *[1] * (weight.dim() - 2))
