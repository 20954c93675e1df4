"""The reliability diagram."""

import pytest
import torch

from vislora.metrics.calibration import calibration
from vislora.report.reliability import draw_reliability


@pytest.mark.parametrize("sharpness", [1.0, 8.0])  # of right predictions, less and more certain than they should be
def test_the_legend_lies_on_no_curve(sharpness):
    torch.manual_seed(0)
    labels = torch.randint(20, (2000,))
    logits = sharpness * (torch.randn(2000, 20) + 4 / sharpness * torch.nn.functional.one_hot(labels, 20))
    figure = draw_reliability(calibration(logits, labels))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    box = axes.get_legend().get_window_extent()
    assert not any(box.contains(x, y) for x, y in axes.transData.transform(axes.lines[1].get_xydata()))
