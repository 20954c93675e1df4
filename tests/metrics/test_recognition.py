"""Scores against scikit-learn."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from vislora.metrics.recognition import Mistake, Predictions, evaluate_predictions, worst_mistakes
from vislora.report.evaluation import write_evaluation


def predictions(logits, labels, classes=None):
    classes = classes or tuple(f"class {i}" for i in range(logits.shape[1]))
    return Predictions(classes, logits, labels, [f"{i}.png" for i in range(len(labels))])


def drawn(k, n=200, seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(k - 1, (n,))  # the last class never occurs
    return torch.randn(n, k) + 2 * torch.nn.functional.one_hot(labels, k), labels


def test_what_is_calibrated_are_the_probabilities_at_the_temperature():
    logits, labels = drawn(6)
    found = evaluate_predictions(predictions(logits, labels), temperature=2.5)
    for temperature, part in ((1.0, found.calibration), (2.5, found.calibrated)):
        likely = (logits.double() / temperature).softmax(1)
        assert part.nll == pytest.approx(log_loss(labels, likely, labels=range(6)), rel=1e-6)


@pytest.mark.parametrize("k", [6, 12])
def test_scores_agree_with_scikit_learn(k):
    logits, labels = drawn(k, seed=k)
    found = evaluate_predictions(predictions(logits, labels))
    predicted = logits.argmax(1)
    assert (predicted == k - 1).any()  # a class without images is predicted: the means below have to leave it out or in
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(k), zero_division=0
    )
    np.testing.assert_allclose(found.precision, precision, atol=1e-6)
    np.testing.assert_allclose(found.recall, recall, atol=1e-6)
    np.testing.assert_allclose(found.f1, f1, atol=1e-6)
    assert np.array_equal(found.confusion, confusion_matrix(labels, predicted, labels=np.arange(k)))
    assert found.top1 == pytest.approx((labels == predicted).double().mean().item(), abs=1e-6)
    top5 = top_k_accuracy_score(labels, logits, k=min(5, k), labels=np.arange(k))
    assert found.top5 == pytest.approx(top5, abs=1e-6)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(labels, predicted)
    assert found.balanced_accuracy == pytest.approx(balanced, abs=1e-6)
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    nll = log_loss(labels, logits.double().softmax(1), labels=np.arange(k))
    assert found.calibration.nll == pytest.approx(nll, abs=1e-6)
    assert [row["images"] for row in found.to_dict()["per_class"].values()] == support.tolist()


def test_the_worst_mistakes_are_the_most_confident_wrong_ones():
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0], [1.0, 0.0]])
    assert worst_mistakes(predictions(logits, torch.tensor([0, 0, 0, 1])), 2) == [2, 1]
    assert worst_mistakes(predictions(logits, torch.tensor([0, 0, 0, 1])), 9) == [2, 1, 3]


def test_classes_in_another_order_change_no_figure():
    logits, labels = drawn(6)
    plain = predictions(logits, labels, tuple("abcdef"))
    turned = plain.in_order_of(tuple("cfbead"))
    assert [turned.classes[i] for i in turned.labels] == [plain.classes[i] for i in plain.labels]
    mine, before = (evaluate_predictions(p).intervals for p in (turned, plain))
    for name, interval in mine.items():
        assert interval == pytest.approx(before[name], abs=1e-12)
    assert torch.equal(turned.in_order_of(plain.classes).logits, logits)


def test_hostile_class_names_survive_all_files(tmp_path):
    names = ("<script>alert(1)</script>", 'a,b\n"c"', "$x^2$ $")
    write_evaluation(evaluate_predictions(predictions(torch.eye(3), torch.arange(3), names)), tmp_path)

    assert list(json.loads((tmp_path / "evaluation.json").read_text())["per_class"]) == list(names)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(names)
    assert [row[0] for row in rows[1:]] == list(names)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == list(names)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert "<script" not in (tmp_path / "confusion.svg").read_text()


def test_of_a_run_that_went_on_no_mistakes_are_shown_that_it_no_longer_makes(tmp_path):
    found = evaluate_predictions(predictions(torch.eye(3), torch.arange(3)))
    mistake = Mistake("0.png", "class 0", "class 1", 0.5, Image.new("RGB", (8, 8)))
    write_evaluation(replace(found, mistakes=[mistake]), tmp_path)
    assert (tmp_path / "mistakes.png").exists()
    write_evaluation(found, tmp_path)
    assert not (tmp_path / "mistakes.png").exists()


def test_a_files_name_of_any_bytes_is_written(tmp_path):
    named = Predictions(("a", "b"), torch.eye(2), torch.arange(2), ["a.png", "caf\udce9.png"])
    evaluate_predictions(named, resamples=10).write(tmp_path)
    assert r"caf\udce9.png,b,b," in (tmp_path / "predictions.csv").read_text()
    assert (tmp_path / "confusion.csv").read_text().startswith("true \\ predicted,a,b")


def test_class_without_images_has_no_figures_in_the_table():
    logits, labels = drawn(6)
    lines = evaluate_predictions(predictions(logits, labels)).table().splitlines()
    assert lines[6].split() == ["class", "5", "0", "-", "-", "-"]
    assert lines[1].count("%") == 3
    assert len(lines[6]) == len(lines[1])
