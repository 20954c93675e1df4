"""How far each layer moved, as a run's folder and its report tell."""

import json

import pytest

from vislora.metrics.updates import LayerUpdate
from vislora.report.sections import updates
from vislora.report.updates import write_updates


def test_a_layer_that_started_as_nothing_has_no_relative_update(tmp_path):
    write_updates([LayerUpdate("qkv", 1.0, 4.0), LayerUpdate("gate", 0.5, 0.0)], tmp_path)
    told = json.loads((tmp_path / "updates.json").read_text(), parse_constant=pytest.fail)  # Infinity is no JSON
    assert [row["relative"] for row in told] == [0.25, None]
    assert "<td>25.00%</td>" in updates(tmp_path).html
    assert "<td></td>" in updates(tmp_path).html
