"""Scores of pictures against plain loops and what they mean by definition."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import norm

from vislora.metrics.pictures import StyleAxis, diversity, kept_content, mean_estimate


def drawn(count, mean, seeds=1, spread=(1.0, 2.0, 3.0, 4.0, 5.0), seed=0):
    """Statistics of pictures of so many prompts, which have a part of their noise in common."""
    generator = torch.Generator().manual_seed(seed)
    of_prompts, own = (torch.randn(n, 5, generator=generator).double() for n in (count, count * seeds))
    return (of_prompts.repeat_interleave(seeds, 0) + own) * torch.tensor(spread).double() + mean


def test_the_style_axis_is_a_linear_discriminant_with_a_diagonal_covariance_without_its_own_noise():
    base, reference, other = drawn(30, 0.0, 2), drawn(50, 5.0, seed=1), drawn(30, 2.0, 2, seed=2)
    pooled = (base.var(0, correction=0) + reference.var(0, correction=0)) / 2
    r, found = reference.mean(0), StyleAxis.between(base, reference, seeds=2).along(other)
    prompts = [base[2 * p : 2 * p + 2].mean(0) for p in range(30)]
    # the squared distance of the means over pairs of different pictures and prompts alone
    one = sum(x * y for x, y in itertools.permutations(prompts, 2)) / (30 * 29)
    two = sum(x * y for x, y in itertools.permutations(reference, 2)) / (50 * 49)
    length = ((one + two - 2 * r * torch.stack(prompts).mean(0)) / pooled).sum()
    for i in range(60):
        rest = torch.stack([prompt for p, prompt in enumerate(prompts) if p != i // 2]).mean(0)
        wanted = ((other[i] - base[i]) * (r - rest) / pooled).sum() / length
        assert found[i].item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize(("count", "seeds"), [(54, 1), (16, 2)])
def test_other_pictures_are_at_0_and_1_on_average_however_few_there_are(count, seeds):
    """Where all of a picture's noise is its own, as of an adapter that leaves nothing of its content."""
    ends: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
    for seed in range(0, 1500, 5):
        base, reference = drawn(count, 0.0, seeds, seed=seed), drawn(20, 1.5, seed=seed + 1)
        if (axis := StyleAxis.between(base, reference, seeds)) is not None:
            for share, values in ends.items():
                values.append(axis.along(drawn(count, 1.5 * share, seeds, seed=seed + 2)).mean().item())
    for share, values in ends.items():
        assert np.mean(values) == pytest.approx(share, abs=4 * np.std(values) / np.sqrt(len(values)) + 0.02)


def test_the_base_models_own_pictures_are_at_0_and_what_moves_on_the_way_is_on_it():
    base, reference = drawn(20, 0.0), drawn(30, 5.0, seed=1)
    axis = StyleAxis.between(base, reference)
    assert axis.along(base).abs().max() == 0
    one = axis.along(base + (reference.mean(0) - base.mean(0)))
    torch.testing.assert_close(axis.along(base + (reference.mean(0) - base.mean(0)) / 2), one / 2)
    assert one.mean().item() == pytest.approx(1, abs=0.1)


def test_a_statistic_that_never_varies_counts_for_nothing():
    base, reference = drawn(20, 0.0), drawn(20, 5.0, seed=1)
    without = StyleAxis.between(base[:, 1:], reference[:, 1:]).along(base[:, 1:] + 1)
    base[:, 0] = reference[:, 0] = 5.0
    torch.testing.assert_close(StyleAxis.between(base, reference).along(base + 1), without)


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


def test_two_samples_of_one_style_lead_nowhere():
    found = [StyleAxis.between(drawn(27, 0.0, 2, seed=s), drawn(20, 0.0, seed=s + 1), 2) for s in range(0, 200, 2)]
    assert sum(axis is None for axis in found) > 85
    same = drawn(5, 0.0)
    assert StyleAxis.between(same, same.clone()) is None
