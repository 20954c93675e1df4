"""One product as wide as the layer gives the gradients of A and B, in the layers that are narrow enough for it."""

import pytest
import torch
from torch import nn

from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.lora.layers import LowRank
from vislora.lora.narrow import is_narrow


@pytest.mark.parametrize(
    ("width", "rank", "narrow"), [(64, 8, True), (128, 8, True), (192, 8, False), (320, 16, False), (320, 32, True)]
)
def test_width_and_rank_decide(width, rank, narrow):
    low = LowRank(torch.zeros(width, width), rank, 1.0)
    assert is_narrow(torch.zeros(width, width), *low.acting()) is narrow
    assert not is_narrow(torch.zeros(width, width).half(), *low.acting())


def step_of(width: int) -> str:
    model = nn.Sequential(nn.Linear(width, width))
    Adapters(model).add("it", [TargetLayer("0")], LoraSettings(8, 8))
    return model(torch.zeros(2, width)).grad_fn.name()


def test_layers_take_the_step_for_their_width():
    assert step_of(64) != step_of(256) == "_FusedLinearBackward"
