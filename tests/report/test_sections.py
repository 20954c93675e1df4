"""The parts of a report say what the files in a run's folder hold."""

import json
import re

import torch
from PIL import Image

from vislora.metrics.recognition import Predictions, evaluate_predictions
from vislora.report.evaluation import write_evaluation
from vislora.report.sections import all_scores, data, recognition, samples


def test_a_preview_is_called_by_its_step(tmp_path):
    (tmp_path / "previews").mkdir()
    for stem in ("step_00000000", "step_00000390"):
        Image.new("RGB", (8, 8)).save(tmp_path / "previews" / f"{stem}.png")
    html = samples(tmp_path).html
    assert html.index("<figcaption>step 0</figcaption>") < html.index("<figcaption>step 390</figcaption>")


def test_a_recognisers_figures_and_largest_confusions_are_told(tmp_path):
    """Of 40 wrens 9 are taken for larks and one for a kite; of 20 larks one for a wren; kites are all right."""
    said = [0] * 30 + [1] * 9 + [2] + [1] * 19 + [0] + [2] * 40
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 40)
    logits = 4.0 * torch.nn.functional.one_hot(torch.tensor(said), 3)
    found = evaluate_predictions(
        Predictions(("wren", "lark", "kite"), logits, labels, [f"{i}.png" for i in range(100)])
    )
    write_evaluation(found, tmp_path)
    html = recognition(tmp_path)
    table = html[html.index("Largest confusions") :]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    assert rows[1:] == [["wren", "lark", "9"], ["wren", "kite", "1"], ["lark", "wren", "1"]]
    low, high = found.intervals["top1"]
    assert "89.0%" in html
    assert f"95%: {low:.1%} to {high:.1%}" in html
    assert 0.80 < low < 0.86
    assert 0.92 < high < 0.97


def test_a_table_of_scores_has_each_figure_over_its_interval(tmp_path):
    figures = ("top1", "top5", "balanced_accuracy", "macro_f1", "ece")
    row = {key: 0.5 + i / 100 for i, key in enumerate(figures)} | {
        "name": "mine",
        "data": "birds",
        "images": 1200,
        "nll": 0.25,
    }
    row["intervals"] = {key: [row[key] - 0.021, row[key] + 0.034] for key in figures}
    (tmp_path / "scores.json").write_text(json.dumps([row]))
    html = all_scores(tmp_path).html
    for i in range(5):
        assert f"{50 + i}.0%\n{47.9 + i:.1f} to {53.4 + i:.1f}" in re.sub(r"<br ?/?>", "\n", html)


def test_a_report_says_where_nothing_was_held_out(tmp_path):
    for pictures, told in (({"train": 24}, True), ({"train": 20, "val": 4}, False), ({"train": 9, "test": 9}, False)):
        (tmp_path / "data.json").write_text(json.dumps({"pictures": pictures, "findings": []}))
        assert ("Nothing was held out to measure on" in data(tmp_path).html) is told
