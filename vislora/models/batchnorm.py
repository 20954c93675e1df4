"""BatchNorm in training: which layers go by the pictures of a pass, and whether those are enough for them."""

import torch
from torch import Tensor, nn

from vislora.data.order import Order
from vislora.errors import ConfigError


def by_the_batch(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers that gather statistics in training, by name. Those of a frozen base keep the statistics they
    were frozen with, as no adapter's file holds new ones, also where it holds their biases."""
    whole = all(p.requires_grad for p in model.parameters())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (whole or (module.weight is not None and module.weight.requires_grad))
    }


@torch.no_grad()
def check_passes(model: nn.Module, order: Order, picture: Tensor) -> None:
    """Refuse passes of one picture where it has a single number for a channel of such a layer, over which torch would
    raise when the first of them comes.

    Args:
        model: in eval mode, with everything that is to be trained requiring a gradient.
        order: of the training.
        picture: an example, [1, 3, H, W].

    Raises:
        ConfigError: there are such passes.
    """
    layers = by_the_batch(model)
    if order.smallest_pass > 1 or not layers:
        return
    single: list[str] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: single.append(name) if args[0].numel() == layer.num_features else None
        )
        for name, layer in layers.items()
    ]
    try:
        model(picture)
    finally:
        for handle in handles:
            handle.remove()
    if single:
        raise ConfigError(
            f"{single[0]} is a BatchNorm that is trained, and goes by several pictures; trainer.batch_size="
            f"{order.batch_size} over {order.size} training images in trainer.accumulation={order.accumulation} passes "
            "leaves some with one; use larger batches or fewer passes"
        )
