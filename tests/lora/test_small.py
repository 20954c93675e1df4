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


def step_of(layer: nn.Module, x: torch.Tensor) -> set[str]:
    """The nodes that a layer's output hangs on."""
    model = nn.Sequential(layer)
    Adapters(model).add("it", [TargetLayer("0")], LoraSettings(8, 8))
    y = model(x)  # without it its node would be gone
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


def test_layers_take_the_step_for_their_size():
    assert "FusedLinearBackward" in step_of(nn.Linear(256, 256), torch.zeros(1000, 256))
    assert "FusedLinearBackward" not in step_of(nn.Linear(256, 256), torch.zeros(2, 256))
    assert "FusedLinearBackward" not in step_of(nn.Linear(64, 64), torch.zeros(1000, 64))


def test_convolutions_take_the_step_for_their_kernel_and_size(monkeypatch):
    assert "FusedConv2dBackward" in step_of(nn.Conv2d(64, 64, 3), torch.zeros(1, 64, 8, 8))
    assert "FusedConv2dBackward" in step_of(nn.Conv2d(256, 256, 1), torch.zeros(1, 256, 8, 8))
    assert "FusedConv2dBackward" not in step_of(nn.Conv2d(64, 64, 1), torch.zeros(1, 64, 8, 8))

    def sums(*_):
        raise AssertionError("the weight of many pixels' convolution is summed")

    monkeypatch.setattr("vislora.lora.fused.summed", sums)
    step_of(nn.Conv2d(64, 64, 3), torch.zeros(1, 64, 16, 16))
    with pytest.raises(AssertionError, match="is summed"):
        step_of(nn.Conv2d(64, 64, 3), torch.zeros(1, 64, 32, 32))
