"""Calibration against torchmetrics, a plain loop and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from vislora.errors import DataError
from vislora.metrics.calibration import BINS, calibration, confidence_bins, fit_temperature


def drawn(n=500, k=7, sharpness=2.0):
    labels = torch.randint(k, (n,))
    return sharpness * (torch.randn(n, k) + 1.5 * torch.nn.functional.one_hot(labels, k)), labels


def test_the_expected_calibration_error_is_that_of_torchmetrics():
    logits, labels = drawn(sharpness=1.0)
    theirs = multiclass_calibration_error(logits.double().softmax(1), labels, logits.shape[1], n_bins=BINS)
    assert calibration(logits, labels).ece == pytest.approx(theirs.item(), abs=1e-6)


def test_bins_hold_their_right_edge_and_what_is_certain():
    # confidences 1 (which torchmetrics puts beyond its last bin), and 2/3 exactly, an edge
    logits = torch.tensor([[0.0, -1e4], [0.0, -1e4], [0.0, 0.0]])
    found = calibration(logits, torch.tensor([0, 1, 0]))
    assert found.images[-1] == 2
    assert found.accuracy[-1] == 0.5
    edges = np.array([i / BINS for i in range(1, BINS + 1)])
    assert confidence_bins(edges).tolist() == list(range(BINS))
    assert confidence_bins(edges[:-1] + 1e-9).tolist() == list(range(1, BINS))


def test_each_bin_agrees_with_a_plain_loop():
    logits, labels = drawn()
    found = calibration(logits, labels, temperature=1.7)
    confidence, predicted = (logits.double() / 1.7).softmax(1).max(1)
    total = 0.0
    for i in range(BINS):
        inside = [j for j in range(len(labels)) if i / BINS < confidence[j].item() <= (i + 1) / BINS]
        assert found.images[i] == len(inside)
        if inside:
            mean = float(np.mean([confidence[j].item() for j in inside]))
            right = float(np.mean([predicted[j].item() == labels[j].item() for j in inside]))
            assert found.confidence[i] == pytest.approx(mean, abs=1e-9)
            assert found.accuracy[i] == pytest.approx(right, abs=1e-9)
            total += abs(mean - right) * len(inside) / len(labels)
    assert found.ece == pytest.approx(total, abs=1e-9)


def test_the_fitted_temperature_is_a_minimum_of_scikit_learns_log_loss_and_undoes_a_factor():
    logits, labels = drawn(sharpness=1.0)
    best = fit_temperature(logits, labels)
    at = {t: log_loss(labels, (logits.double() / t).softmax(1)) for t in (best - 1e-3, best, best + 1e-3)}
    assert at[best] == min(at.values())
    assert fit_temperature(5 * logits, labels) == pytest.approx(5 * best, rel=1e-5)
    assert calibration(logits, labels, best).nll == pytest.approx(at[best], abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (5 * torch.eye(3), "none is classified wrongly"),
        (-torch.eye(3), "by their logits the classes are no likelier than others"),
        (torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [9.0, 0.0, 0.0]]), "no likelier than others"),  # two are right
    ],
)
def test_where_colder_or_hotter_is_always_better_no_temperature_fits(logits, why):
    labels = torch.arange(3)
    with pytest.raises(DataError, match=f"no temperature fits the 3 validation images: .*{why}"):
        fit_temperature(logits, labels)
    at = [log_loss(labels, (logits.double() / t).softmax(1), labels=[0, 1, 2]) for t in (0.5, 1.0, 2.0, 4.0, 1e3)]
    assert at == sorted(at) or at == sorted(at, reverse=True)
