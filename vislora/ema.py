"""An exponential moving average of what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of a model's trained parameters, and of its BatchNorm layers' statistics, in float32 beside them.

    The average moves by 1 - decay at each step, faster during the first ones: decay is capped by (1 + n) / (10 + n)
    after n steps, so that the untrained start is soon forgotten. Statistics of what the newest weights answer wouldn't
    fit the averaged ones.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._moving |= running_statistics(model)
        self.averages: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self._moving.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the model, after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.float() for p in self._moving.values()]
        torch._foreach_lerp_(list(self.averages.values()), now, 1.0 - decay)

    def load(self, averages: dict[str, Tensor]) -> None:
        """Take over saved averages, by their names."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy values into the model, by name; what it held before is the answer."""
        before = {name: p.detach().clone() for name, p in self._moving.items()}
        for name, p in self._moving.items():
            p.copy_(values[name])
        return before


@contextmanager
def averaged(ema: Ema | None) -> Iterator[None]:
    """The model computes with its averages meanwhile; with what it holds where there are none."""
    if ema is None:
        yield
        return
    trained = ema.put(ema.averages)  # which stay as they are: parameters in 16 bits would round them
    try:
        yield
    finally:
        ema.put(trained)


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The means and variances that a model's BatchNorm layers have gathered, by name."""
    return {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
