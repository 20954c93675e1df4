"""Which pixels speak for a class."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def integrated_gradients(
    model: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor, steps: int = 32
) -> tuple[Tensor, Tensor]:
    """Integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) of a class's logit, along the
    straight line from the uniform picture of mean colour (zeros) to the image, by the midpoint rule.

    It needs nothing of the model but gradients, so that it means the same for every architecture; attention maps leave
    out what values, MLPs and residuals do with them.

    Args:
        model: images [B, 3, H, W] -> logits [B, K].
        images: normalised, [B, 3, H, W].
        classes: [B].

    Returns:
        maps [B, H, W], summed over the channels, positive where a pixel speaks for the class; and [B], by how much
        their sums differ from what they are to add up to, logit(image) - logit(zeros).
    """
    total = torch.zeros_like(images)
    for step in range(steps):
        at = (images * ((step + 0.5) / steps)).requires_grad_(True)
        with torch.enable_grad():
            logits = model(at).gather(1, classes[:, None]).sum()
        total += torch.autograd.grad(logits, at)[0]
    maps = (images * total / steps).sum(1)
    with torch.no_grad():
        ends = [model(end).gather(1, classes[:, None])[:, 0] for end in (images, torch.zeros_like(images))]
    return maps, maps.sum((1, 2)) - (ends[0] - ends[1])


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Maps [B, H, W] blurred by a Gaussian of `sigma` pixels, their sums kept but for what leaves at the edges."""
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device) / sigma) ** 2)
    kernel /= kernel.sum()
    blurred = F.conv2d(maps[:, None], kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(blurred, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0]
