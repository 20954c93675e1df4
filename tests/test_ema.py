"""Averages of what is trained."""

import torch
from torch import nn

from vislora.ema import Ema, averaged


def test_the_average_is_the_sum_of_its_recursion():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 3.0, -1.0), 1):
        model.weight.data.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.averages["weight"], torch.full((1, 2), expected))


def test_only_what_is_trained_is_averaged():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert Ema(model, 0.9).averages.keys() == {"weight"}


def test_batchnorms_statistics_are_averaged_as_the_weights_before_it_are():
    norm = nn.BatchNorm1d(1)
    ema = Ema(norm, 0.9)
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(5.0)
    ema.update(1)
    share = 1 - 2 / 11
    with averaged(ema):
        torch.testing.assert_close(norm.running_mean.item(), 3.0 * share)
        torch.testing.assert_close(norm.running_var.item(), 1.0 + 4.0 * share)
    assert (norm.running_mean.item(), norm.running_var.item()) == (3.0, 5.0)


def test_the_model_has_its_own_parameters_back_after_computing_with_the_averages():
    model = nn.Linear(2, 1, bias=False)
    ema = Ema(model, 0.9)
    start, storage = model.weight.detach().clone(), model.weight.data_ptr()
    model.weight.data.fill_(5.0)
    with averaged(ema):
        assert torch.equal(model.weight, start)
    assert torch.equal(model.weight, torch.full((1, 2), 5.0))
    assert model.weight.data_ptr() == storage
    assert torch.equal(ema.averages["weight"], start)
    with averaged(None):
        assert torch.equal(model.weight, torch.full((1, 2), 5.0))


def test_half_precision_parameters_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.999)
    model.weight.data.fill_(1.5)
    for step in range(10_000, 10_100):
        ema.update(step)
    torch.testing.assert_close(ema.averages["weight"].item(), 1.5 - 0.5 * 0.999**100, rtol=1e-4, atol=0)
    average = ema.averages["weight"].clone()
    with averaged(ema):
        assert model.weight.dtype == torch.bfloat16
    assert torch.equal(ema.averages["weight"], average)
