"""The products of the fused step, by themselves."""

import pytest
import torch
from torch import nn

from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.lora.fused import row_sums


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("rows", [0, 1, 6, 13, 96])
def test_row_sums_are_the_product_whatever_the_slices(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    left, right = torch.randn(rows, 10, dtype=torch.float64)[:, 3:7], torch.randn(rows, 5, dtype=torch.float64)
    torch.testing.assert_close(row_sums(left, right, 0.5), 0.5 * left.t() @ right)


def test_slices_follow_the_threads(monkeypatch):
    shapes = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(tuple(a.shape)) or product(a, b))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    row_sums(torch.randn(8 * 197, 8), torch.randn(8 * 197, 3), 1.0)
    assert shapes == [(4, 8, 2 * 197)]  # two for each thread


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_samples_give_no_gradient(dropout, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 16))
    Adapters(model).add("it", [TargetLayer("0"), TargetLayer("3")], LoraSettings(1, 1.0, dropout))
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = model(x)
    assert y.shape == (0, 64, 16)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for layer in (model[0], model[3]):
        assert torch.equal(layer.lora.lora_A.grad, torch.zeros_like(layer.lora.lora_A))
        assert torch.equal(layer.lora.lora_B.grad, torch.zeros_like(layer.lora.lora_B))
