"""Which pixels speak for a class."""

from collections.abc import Callable

import torch
from torch import Tensor


def integrated_gradients(model: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor, steps: int = 32) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) of a class's logit, along the
    straight line from the uniform picture of mean colour (zeros) to the image, by the midpoint rule.

    It needs nothing of the model but gradients, so that it means the same for every architecture; attention maps leave
    out what values, MLPs and residuals do with them.

    Args:
        model: images [B, 3, H, W] -> logits [B, K].
        images: normalised, [B, 3, H, W].
        classes: [B].

    Returns:
        maps [B, H, W], summed over the channels, positive where a pixel speaks for the class. They add up to
        logit(image) - logit(zeros), but for the rule's error.
    """
    total = torch.zeros_like(images)
    for step in range(steps):
        at = (images * ((step + 0.5) / steps)).requires_grad_(True)
        with torch.enable_grad():
            logits = model(at).gather(1, classes[:, None]).sum()
        total += torch.autograd.grad(logits, at)[0]
    return (images * total / steps).sum(1)
