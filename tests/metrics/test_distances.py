"""Distances between sets of features against closed forms, other implementations, and plain loops."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from vislora.errors import DataError
from vislora.metrics.distances import frechet_distance, kernel_distance, sample_warning


def gaussians(n, d, seed, shift=0.0):
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=draws, dtype=torch.float64)
    return torch.randn(n, d, generator=draws, dtype=torch.float64) @ mix + shift


def exactly(mean, deviations):
    """Points whose sample mean is `mean` and whose covariance is diag(deviations^2) to the last bit or so."""
    d = len(mean)
    points = torch.cat([torch.eye(d), -torch.eye(d)]).double() * np.sqrt((2 * d - 1) / 2)
    return points * torch.tensor(deviations) + torch.tensor(mean)


def test_frechet_distance_has_its_closed_form_for_gaussians_with_commuting_covariances():
    one, other = [1.0, -2.0, 0.5, 3.0], [0.5, 2.0, 1.0, 0.1]
    sigma, tau = [0.3, 1.2, 2.0, 0.7], [1.3, 0.2, 2.5, 0.7]
    expected = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    expected += sum((a - b) ** 2 for a, b in zip(sigma, tau, strict=True))
    found = frechet_distance(exactly(one, sigma), exactly(other, tau))
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(40, 90), (9, 30)])  # with a singular covariance, too
def test_frechet_distance_is_that_of_scipys_matrix_square_root(n, m):
    one, other = gaussians(n, 12, 0), gaussians(m, 12, 1, shift=0.5)
    means = [x.mean(0).numpy() for x in (one, other)]
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (one, other))
    # of the symmetric form, which has the same trace and no complex part
    half = scipy.linalg.sqrtm(c2).real
    root = np.sqrt(np.linalg.eigvalsh(half @ c1 @ half).clip(0)).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics_where_pictures_are_many():
    one, other = gaussians(400, 12, 0), gaussians(300, 12, 1, shift=0.5)
    network = nn.Identity()
    network.num_features = 12
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(one, real=True)
    metric.update(other, real=False)
    assert frechet_distance(one, other) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_frechet_distance_of_few_pictures_in_many_dimensions_keeps_its_digits():
    """Four directions of 192, turned at random: the rest of either covariance is 0."""
    turn = torch.linalg.qr(gaussians(192, 192, 2)).Q
    sigma, tau = [0.3, 1.2, 2.0, 0.7], [1.3, 0.2, 2.5, 0.7]
    one, other = exactly([0.0] * 4, sigma) @ turn[:4], exactly([0.0] * 4, tau) @ turn[:4]
    apart = exactly([0.0] * 4, tau) @ turn[4:8]
    expected = sum((a - b) ** 2 for a, b in zip(sigma, tau, strict=True))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, apart) == pytest.approx(sum(x**2 for x in [*sigma, *tau]), rel=1e-6)


def test_a_set_is_at_no_distance_from_itself():
    features = gaussians(40, 12, 0)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_that_of_a_plain_loop():
    one, other = gaussians(5, 3, 0), gaussians(7, 3, 1)
    kernel = lambda x, y: float(x @ y / 3 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(x, y) for x, y in itertools.permutations(s, 2)]) for s in (one, other)]
    across = np.mean([kernel(x, y) for x in one for y in other])
    value, (low, high) = kernel_distance(one, other)
    assert value == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert low < high


def test_kernel_distance_is_torchmetrics_where_the_sets_are_of_one_size():
    one, other = gaussians(30, 6, 0), gaussians(30, 6, 1)
    assert kernel_distance(one, other)[0] == pytest.approx(poly_mmd(other, one).item(), rel=1e-6)


def test_its_interval_spreads_as_repeated_experiments_do():
    """Over many pairs of fresh samples: the interval's width against 3.92 standard deviations of the estimates."""
    values, widths = [], []
    for seed in range(100):
        draws = torch.Generator().manual_seed(seed)
        one = torch.rand(60, 4, generator=draws, dtype=torch.float64)
        other = torch.rand(60, 4, generator=draws, dtype=torch.float64) + 0.5
        value, (low, high) = kernel_distance(one, other, subsets=100)
        values.append(value)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(3.92 * np.std(values), rel=0.25)


def test_pictures_of_one_prompt_are_drawn_together():
    """Ten units of three identical pictures are as far as ten pictures, and vary as those do, not as thirty."""
    ten, other = gaussians(10, 4, 0), gaussians(400, 4, 1)
    thirty, units = ten.repeat_interleave(3, 0), torch.arange(10).repeat_interleave(3)
    value, ends = kernel_distance(thirty, other, units)
    of_ten, ends_of_ten = kernel_distance(ten, other)
    assert value == pytest.approx(of_ten, rel=1e-9)
    assert ends == pytest.approx(ends_of_ten, rel=1e-9)


def test_pictures_that_a_prompt_makes_alike_are_at_no_distance_from_their_own_kind():
    values = []
    for seed in range(200):
        draws = torch.Generator().manual_seed(seed)
        prompts = torch.randn(12, 1, 8, generator=draws, dtype=torch.float64)
        pictures = 0.8 * prompts + 0.6 * torch.randn(12, 3, 8, generator=draws, dtype=torch.float64)  # variance 1
        reference = torch.randn(40, 8, generator=draws, dtype=torch.float64)
        values.append(kernel_distance(pictures.flatten(0, 1), reference, torch.arange(12).repeat_interleave(3), 2)[0])
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5


def test_too_few_pictures_are_refused_and_few_are_warned_of():
    with pytest.raises(DataError, match="two pictures of each kind; there is 1"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(DataError, match="four units of each kind; there are 3"):
        kernel_distance(torch.zeros(6, 4), torch.zeros(9, 4), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert "singular" in sample_warning(54, 32, 192)
    assert "noisy" in sample_warning(540, 320, 192)
    assert sample_warning(1000, 960, 192) is None
