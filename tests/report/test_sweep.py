"""Style against content as a picture."""

import warnings

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vislora.metrics.pictures import Estimate
from vislora.report.sweep import draw_sweep


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("length", [3, 40, 200])
def test_names_of_any_length_are_inside_the_picture_and_beside_the_curves(count, length):
    points = [(scale, Estimate(scale), Estimate(1 - scale)) for scale in (0.0, 0.5, 1.0)]
    names = [f"{k:02}{'/runs/mine' * 20}"[: length - 2] + f"{k:02}" for k in range(count)]
    figure = draw_sweep(dict.fromkeys(names, points), "style", "content")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that collapsed
        FigureCanvasAgg(figure).draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert min(axes.bbox.width, axes.bbox.height) > 200
    assert [text.get_text()[-2:] for text in legend.get_texts()] == [f"{k:02}" for k in range(count)]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= axes.bbox.y0
