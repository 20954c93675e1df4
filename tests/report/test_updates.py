"""How far each layer moved, as a run's folder and its report tell."""

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vislora.metrics.updates import LayerUpdate
from vislora.report.sections import updates
from vislora.report.updates import draw_updates, write_updates


@pytest.mark.parametrize("count", [5, 120])
@pytest.mark.parametrize("name", ["qkv", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"])
def test_all_that_is_written_is_inside_the_picture_and_the_bars_fill_it(count, name):
    figure = draw_updates([LayerUpdate(name, 1.0, 4.0)] * count)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    written = [*figure.texts, axes.xaxis.label, *axes.get_yticklabels()]
    for text in written:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
    assert any("the first 96 of 120 layers" in text.get_text() for text in written) == (count == 120)
    boxes = [bar.get_window_extent() for bar in axes.patches]
    assert boxes[0].y0 > boxes[-1].y1  # the first layer is on top
    bar = boxes[0].height
    assert bar / 8 < axes.bbox.y1 - boxes[0].y1 < bar
    assert bar / 8 < boxes[-1].y0 - axes.bbox.y0 < bar


def test_a_layer_that_started_as_nothing_has_no_relative_update(tmp_path):
    write_updates([LayerUpdate("qkv", 1.0, 4.0), LayerUpdate("gate", 0.5, 0.0)], tmp_path)
    told = json.loads((tmp_path / "updates.json").read_text(), parse_constant=pytest.fail)  # Infinity is no JSON
    assert [row["relative"] for row in told] == [0.25, None]
    assert "<td>25.00%</td>" in updates(tmp_path).html
    assert "<td></td>" in updates(tmp_path).html
