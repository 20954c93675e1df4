"""Bootstrap intervals against scipy with scikit-learn's scores, Wilson's against its formula, and all against what they
promise."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import f1_score, recall_score

from vislora.metrics.intervals import FIGURES, Outcomes, differences, intervals, mean_interval
from vislora.metrics.recognition import Predictions, evaluate_predictions


def drawn(seed, n=150, k=5, strength=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(n, k, generator=generator) + strength * torch.nn.functional.one_hot(labels, k)
    return logits.double().softmax(1), labels


def theirs(score, labels, predicted, seed, resamples):
    return bootstrap(
        (np.asarray(labels), np.asarray(predicted)),
        score,
        paired=True,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval


def test_intervals_are_scipys_over_scikit_learns_scores():
    probabilities, labels = drawn(1)
    found = intervals(Outcomes.of(probabilities, labels), resamples=300, seed=7)
    predicted = probabilities.argmax(1)
    macro = theirs(lambda a, b: f1_score(a, b, average="macro"), labels, predicted, 7, 300)
    assert found["macro_f1"] == pytest.approx(macro, abs=1e-6)


def test_a_class_that_a_draw_misses_or_has_once_counts_as_in_scikit_learn():
    labels = torch.tensor([0] * 20 + [1, 1, 2])  # every third draw has no 2, and is of fewer classes
    probabilities = torch.full((23, 3), 0.1, dtype=torch.float64)
    probabilities[range(23), torch.tensor([0] * 15 + [1] * 5 + [1, 2, 2])] = 0.8
    found = intervals(Outcomes.of(probabilities, labels), resamples=400, seed=3)
    predicted = probabilities.argmax(1)
    f1 = theirs(lambda a, b: f1_score(a, b, average="macro"), labels, predicted, 3, 400)
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-6)

    def recall(true, said):
        return recall_score(true, said, average="macro", labels=np.unique(true), zero_division=0)

    assert found["balanced_accuracy"] == pytest.approx(theirs(recall, labels, predicted, 3, 400), abs=1e-6)


def test_a_calibration_error_is_never_below_zero():
    probabilities, labels = torch.tensor([[0.75, 0.25]] * 60), torch.tensor([0] * 45 + [1] * 15)  # as many as are said
    low, high = intervals(Outcomes.of(probabilities, labels), resamples=200)["ece"]
    assert low == 0.0 < high


def test_what_is_resampled_are_the_figures_that_are_reported():
    probabilities, labels = drawn(1, k=9)
    outcomes = Outcomes.of(probabilities, labels)
    whole = outcomes.figures(np.arange(len(labels))[None])[:, 0]
    reported = evaluate_predictions(
        Predictions(tuple("abcdefghi"), probabilities.log(), labels, list(map(str, labels))), resamples=50
    ).to_dict()
    assert whole == pytest.approx([reported[name] for name in FIGURES], abs=1e-6)


def test_a_seed_gives_the_same_interval_in_any_number_of_chunks(monkeypatch):
    outcomes = Outcomes.of(*drawn(2))
    first = intervals(outcomes, 200, seed=3)
    monkeypatch.setattr("vislora.metrics.intervals._CHUNK", 7 * 150)
    assert intervals(outcomes, 200, seed=3) == first
    assert intervals(outcomes, 200, seed=4) != first


def test_paired_differences_are_narrower_than_those_of_strangers_and_none_for_the_same():
    one, labels = drawn(1)
    a, b = Outcomes.of(one, labels), Outcomes.of((0.9 * one + 0.02), labels)
    assert differences(a, a, 200)["top1"] == (0.0, 0.0)
    low, high = differences(a, Outcomes.of(drawn(5, strength=0.5)[0], labels), 500)["top1"]
    assert low > 0  # a is far better
    (wide_low, wide_high) = intervals(a, 500)["top1"]
    low, high = differences(a, b, 500)["top1"]
    assert high - low < 0.2 * (wide_high - wide_low)  # b errs where a does


def test_a_paired_comparison_of_other_images_is_refused():
    a, b = Outcomes.of(*drawn(1)), Outcomes.of(*drawn(1, n=149))
    with pytest.raises(ValueError, match="the same images"):
        differences(a, b)


def test_19_of_20_intervals_hold_the_truth():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        values = (rng.random(200) < 0.7).astype(float)
        low, high = mean_interval(values, 400, seed=trial)
        held += low <= 0.7 <= high
    assert 180 <= held <= 198  # 190 expected, binomial


def shares(n, right):
    """Outcomes of six classes, of which the first `right` images are found, and the others not among five."""
    labels = torch.tensor([0] * right + [5] * (n - right))
    return Outcomes.of(torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.07, 0.03]], dtype=torch.float64).expand(n, 6), labels)


@pytest.mark.parametrize(("n", "right"), [(6, 6), (6, 0), (150, 101)])
def test_shares_of_images_have_the_interval_of_wilson(n, right):
    found, z, p = intervals(shares(n, right), 10), 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert found["top1"] == pytest.approx(expected, abs=1e-6)
    assert found["top5"] == found["top1"]


def test_among_five_classes_all_are_in_the_first_five():
    labels = torch.tensor([0, 1, 2, 0])
    found = intervals(Outcomes.of(torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3), labels), 10)
    assert found["top5"] == (1.0, 1.0)


def test_19_of_20_intervals_of_few_images_hold_the_share_that_nearly_all_are_right():
    counts = np.random.default_rng(0).binomial(40, 0.97, 300)
    ends = {right: intervals(shares(40, right), 10)["top1"] for right in {*counts.tolist()}}
    held = sum(ends[right][0] <= 0.97 <= ends[right][1] for right in counts.tolist())
    assert held >= 270  # 285 expected; of the bootstrap 210, as every third draw has all of them right


def overconfident(seed, n, temperature):
    """Outcomes of a classifier whose logits have to be divided by a temperature for its probabilities to be right."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Outcomes.of((temperature * logits).double().softmax(1), labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_19_of_20_intervals_hold_the_calibration_error_of_so_many_images(temperature):
    errors, ends = [], []
    for trial in range(100):
        outcomes = overconfident(trial, 300, temperature)
        errors.append(outcomes.figures(np.arange(300)[None])[-1, 0])
        ends.append(intervals(outcomes, 200, seed=trial)["ece"])
    held = sum(low <= np.mean(errors) <= high for low, high in ends)
    assert held >= 90  # 95 expected, binomial
    assert all(0 <= low <= error <= high for (low, high), error in zip(ends, errors, strict=True))


def test_a_difference_of_calibration_errors_is_in_the_middle_of_its_interval():
    one, other = overconfident(1, 300, 1.0), overconfident(1, 300, 2.0)
    whole = [each.figures(np.arange(300)[None])[-1, 0] for each in (one, other)]
    low, high = differences(one, other, 500)["ece"]
    assert (low + high) / 2 == pytest.approx(whole[0] - whole[1], abs=0.01)


def test_of_one_image_the_bootstraps_interval_is_a_point():
    one = Outcomes.of(torch.tensor([[0.2, 0.8]]), torch.tensor([1]))
    assert intervals(one)["macro_f1"] == (1.0, 1.0)
    assert intervals(one)["ece"] == pytest.approx((0.2, 0.2))
