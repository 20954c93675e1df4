"""Scores against scikit-learn."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from vislora.metrics.recognition import evaluate_probabilities


@pytest.mark.parametrize("k", [6, 12])
def test_scores_agree_with_scikit_learn(k):
    torch.manual_seed(k)
    labels = torch.randint(k - 1, (200,))  # the last class never occurs
    logits = torch.randn(200, k) + 2 * torch.nn.functional.one_hot(labels, k)
    found = evaluate_probabilities(logits.softmax(1), labels, tuple(f"class {i}" for i in range(k)))
    predicted = logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(k), zero_division=0
    )
    np.testing.assert_allclose(found.precision, precision, atol=1e-6)
    np.testing.assert_allclose(found.recall, recall, atol=1e-6)
    np.testing.assert_allclose(found.f1, f1, atol=1e-6)
    assert np.array_equal(found.confusion, confusion_matrix(labels, predicted, labels=np.arange(k)))
    assert found.top1 == pytest.approx((labels == predicted).float().mean().item())
    top5 = top_k_accuracy_score(labels, logits, k=min(5, k), labels=np.arange(k))
    assert found.top5 == pytest.approx(top5, abs=1e-6)
    assert [row["images"] for row in found.to_dict()["per_class"].values()] == support.tolist()


def test_hostile_class_names_survive_all_files(tmp_path):
    names = ("<script>alert(1)</script>", 'a,b\n"c"', "$x^2$ $")
    evaluate_probabilities(torch.eye(3), torch.arange(3), names).write(tmp_path)

    assert list(json.loads((tmp_path / "evaluation.json").read_text())["per_class"]) == list(names)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(names)
    assert [row[0] for row in rows[1:]] == list(names)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
