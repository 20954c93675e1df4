"""Scores of pictures against plain loops and what they mean by definition."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import norm

from vislora.errors import DataError
from vislora.metrics.pictures import StyleAxis, diversity, kept_content, mean_estimate


def test_the_base_is_at_0_and_the_reference_at_1_on_the_style_axis():
    base, reference = torch.randn(20, 7).double(), 3 * torch.randn(9, 7).double() + 1
    axis = StyleAxis.between(base, reference)
    assert axis.along(base).mean().item() == pytest.approx(0, abs=1e-9)
    assert axis.along(reference).mean().item() == pytest.approx(1, abs=1e-9)
    middle = (base.mean(0) + reference.mean(0)) / 2
    assert axis.along(middle[None]).item() == pytest.approx(0.5, abs=1e-9)


def test_the_style_axis_is_a_linear_discriminant_with_a_diagonal_covariance():
    base, reference = np.random.default_rng(0).normal(size=(2, 30, 5)) * [1, 2, 3, 4, 5]
    reference = reference + 1
    pooled = (base.var(0) + reference.var(0)) / 2
    w = (reference.mean(0) - base.mean(0)) / pooled
    expected = (base - base.mean(0)) @ w / ((reference.mean(0) - base.mean(0)) @ w)
    found = StyleAxis.between(torch.from_numpy(base), torch.from_numpy(reference)).along(torch.from_numpy(base))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_statistic_that_never_varies_counts_for_nothing():
    base, reference = torch.randn(20, 3).double(), torch.randn(20, 3).double() + 1
    base[:, 0] = reference[:, 0] = 5.0
    assert torch.isfinite(StyleAxis.between(base, reference).along(base)).all()


def test_content_is_kept_by_the_same_direction_of_features():
    base = torch.randn(4, 6).double()
    torch.testing.assert_close(kept_content(3 * base, base), torch.ones(4).double())
    torch.testing.assert_close(kept_content(-base, base), -torch.ones(4).double())


def test_diversity_is_the_mean_distance_of_all_pairs():
    pooled = torch.randn(3, 4, 6).double()
    for features, found in zip(pooled, diversity(pooled), strict=True):
        cosines = [torch.cosine_similarity(x, y, dim=0).item() for x, y in itertools.combinations(features, 2)]
        assert found.item() == pytest.approx(1 - np.mean(cosines), rel=1e-9)
    assert diversity(pooled[:, :1].expand(3, 4, 6)).abs().max() < 1e-12


def test_intervals_are_over_prompts_and_not_over_their_pictures():
    by_prompt = torch.randn(200).double()
    figure = mean_estimate(by_prompt.repeat_interleave(5), seeds=5)
    assert figure.value == pytest.approx(by_prompt.mean().item(), rel=1e-9)
    half = norm.ppf(0.975) * by_prompt.std().item() / np.sqrt(200)
    assert figure.high - figure.low == pytest.approx(2 * half, rel=0.1)


def test_of_a_single_prompt_they_are_over_its_pictures_and_of_a_single_picture_there_is_none():
    assert mean_estimate(torch.tensor([0.0, 1.0, 1.0]), seeds=3).low < 2 / 3
    assert mean_estimate(torch.tensor([1.0])).low is None


def test_reference_in_the_base_models_own_style_is_refused():
    same = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="the base model's style; give others"):
        StyleAxis.between(same, same.clone())
