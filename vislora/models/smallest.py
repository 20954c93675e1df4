"""Which pictures a model takes: those of its own size, and the smallest, enough to prove that its adapters act."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError, ModelError
from vislora.lora import prove_alive
from vislora.models.vit import input_size

_SIZES = (32, 64, 96, 128, 160, 192, 224)


def prove_alive_cheaply(model: nn.Module) -> int:
    """`prove_alive` on the smallest pictures that will do; returns their size in pixels.

    A size may be refused by the model (fixed positions, windows that don't divide it), or leave an attention one token
    only, over which q and k can't matter; a larger one is tried then, up to the model's own.

    Raises:
        AdapterError: naming the adapted layers that can't move the output at the model's own size.
        ModelError: it fails at that size, as one that was built for another.
    """
    own = input_size(model)[1]
    for size, images in _examples(model, own):
        try:
            prove_alive(model, lambda images=images: model(images))
        except AdapterError:
            if size == own:
                raise
        except Exception as error:  # models refuse a size with whatever fails first in them
            if size == own:
                raise _refused(model, size, error) from error
        else:
            return size
    raise AssertionError("the model's own size is the last one")


@torch.no_grad()
def check_own_size(model: nn.Module) -> None:
    """Refuse a model, in eval mode, that fails on a picture of its own size, as smaller ones don't tell.

    Raises:
        ModelError: it was built for another size.
    """
    try:
        model(blank_picture(model))
    except Exception as error:  # as above
        raise _refused(model, input_size(model)[1], error) from error


def blank_picture(model: nn.Module) -> Tensor:
    """[1, 3, H, W] of the model's own size, where and as what its parameters are."""
    size, parameter = input_size(model)[1], next(model.parameters())
    return torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)


def _refused(model: nn.Module, size: int, error: Exception) -> ModelError:
    return ModelError(
        f"{type(model).__name__} can't take pictures of {size} pixels: {str(error) or repr(error)}; "
        "another model.img_size may do, null is the model's own"
    )


def _examples(model: nn.Module, own: int) -> Iterator[tuple[int, Tensor]]:
    parameter = next(model.parameters())
    for size in (*(size for size in _SIZES if size < own), own):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, size, size, generator=generator)
        yield size, images.to(parameter.device, parameter.dtype)
