"""Narrow layers and short inputs take steps of their own."""

import pytest
import torch
from torch import nn

from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.lora.low_rank import LowRank
from vislora.lora.small import is_narrow, is_short


@pytest.mark.parametrize(
    ("width", "rank", "narrow"), [(64, 8, True), (128, 8, True), (192, 8, False), (320, 16, False), (320, 32, True)]
)
def test_width_and_rank_decide(width, rank, narrow):
    low = LowRank(torch.zeros(width, width), rank, 1.0)
    assert is_narrow(torch.zeros(width, width), *low.acting()) is narrow
    assert not is_narrow(torch.zeros(width, width).half(), *low.acting())


@pytest.mark.parametrize(("rows", "short"), [(16, True), (256, True), (300, True), (340, False), (1576, False)])
def test_rows_decide(rows, short):
    assert is_short(torch.zeros(rows, 320), torch.zeros(320, 320)) is short
    assert is_short(torch.zeros(2, rows // 2, 320), torch.zeros(320, 320)) is short


def step_of(width: int, rows: int) -> set[str]:
    """The nodes that a layer's output hangs on."""
    model = nn.Sequential(nn.Linear(width, width))
    Adapters(model).add("it", [TargetLayer("0")], LoraSettings(8, 8))
    y = model(torch.zeros(rows, width))  # without it its node would be gone
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


def test_layers_take_the_step_for_their_size():
    assert "FusedLinearBackward" in step_of(256, 1000)
    assert "FusedLinearBackward" not in step_of(256, 2) | step_of(64, 1000)
