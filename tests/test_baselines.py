"""The linear probe against scikit-learn, and the base model under an adapter's head."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vislora.baselines import fit_probe, logistic_regression


def blobs(n=120, d=6, k=3):
    labels = torch.randint(k, (n,))
    return torch.randn(n, d, dtype=torch.float64) + 1.5 * torch.eye(k, d, dtype=torch.float64)[labels], labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(penalty):
    x, labels = blobs()
    weight, bias = logistic_regression(x, labels, 3, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    mine = (x @ weight.T + bias).softmax(1)
    np.testing.assert_allclose(mine, theirs.predict_proba(x.numpy()), atol=1e-6)


def test_a_probe_depends_on_neither_scale_nor_offset_of_the_features_and_finds_what_there_is():
    x, labels = blobs(400)
    weight, bias = fit_probe(x, labels, 3)
    again, other = fit_probe(x * 50 + 1000, labels, 3)
    mine, theirs = x.float() @ weight.T + bias, (x * 50 + 1000).float() @ again.T + other
    torch.testing.assert_close(mine.softmax(1), theirs.softmax(1), atol=1e-3, rtol=0)
    fresh, truth = blobs(1000)
    best = (fresh @ torch.eye(3, 6, dtype=torch.float64).T).argmax(1)  # the rule that can't be beaten
    accuracy = ((fresh.float() @ weight.T + bias).argmax(1) == truth).float().mean()
    assert accuracy > (best == truth).float().mean() - 0.03


def test_a_class_without_images_is_never_predicted():
    x, labels = blobs()
    weight, bias = fit_probe(x, 2 * labels, 6)
    logits = x.float() @ weight.T + bias
    assert set(logits.argmax(1).tolist()) == {0, 2, 4}
    assert logits.softmax(1)[:, 1::2].max() < 1e-12
    torch.testing.assert_close(logits[:, ::2], x.float() @ fit_probe(x, labels, 3)[0].T + fit_probe(x, labels, 3)[1])
