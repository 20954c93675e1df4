"""The confusion matrix as a picture."""

import warnings

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vislora.report.confusion import draw_confusion


@pytest.mark.parametrize("length", [3, 40, 100, 250])
def test_names_of_any_length_are_inside_the_picture_with_both_their_ends(length):
    names = [f"{k}{'_Animalia' * 40}"[: length - 2] + f"_{k}" for k in range(5)]
    figure = draw_confusion(torch.eye(5, dtype=torch.long), names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that collapsed
        FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.bbox.width > 150
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for k, label in enumerate(labels):
            assert label.get_text()[0] == label.get_text()[-1] == str(k)
            box = label.get_window_extent()
            assert min(box.x0, box.y0) >= 0
            assert max(box.x1, box.y1) <= figure.bbox.width


def test_a_row_is_a_true_class_and_a_column_what_it_is_taken_for():
    counts = torch.tensor([[5, 3, 0], [1, 0, 2], [4, 0, 0]])
    (axes,) = draw_confusion(counts, ["a", "b", "c"]).axes
    written = {(int(y), int(x)): int(text.get_text()) for text in axes.texts for x, y in [text.get_position()]}
    assert written == {(i, j): counts[i, j] for i in range(3) for j in range(3) if counts[i, j]}
    shares = torch.tensor(axes.images[0].get_array().data)
    torch.testing.assert_close(shares, torch.tensor([[5 / 8, 3 / 8, 0], [1 / 3, 0, 2 / 3], [1, 0, 0]]))
