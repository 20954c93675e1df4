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


def test_a_point_of_the_curve_is_a_bins_confidence_and_accuracy_over_its_share_of_images():
    """Two classes: of 60 images the model is 78% sure, and right on 48; of 40 it is 55% sure, and right on 10."""
    sure = torch.tensor([0.78] * 60 + [0.55] * 40)
    labels = torch.tensor([0] * 48 + [1] * 12 + [0] * 10 + [1] * 30)
    plain = calibration(torch.stack([sure, 1 - sure], 1).log(), labels)
    upper, lower = draw_reliability(plain).axes
    assert upper.lines[1].get_xydata() == pytest.approx(torch.tensor([[0.55, 0.25], [0.78, 0.8]]).numpy(), abs=1e-6)
    shares = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in lower.patches}
    told = {middle: share for middle, share in shares.items() if share}
    assert told == {round(8.5 / 15, 6): 0.4, round(11.5 / 15, 6): 0.6}  # 0.55 and 0.78 lie in the 9th and 12th of 15
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("accuracy", "confidence")
    assert f"ECE {0.4 * 0.30 + 0.6 * 0.02:.1%}" in upper.get_legend().get_texts()[0].get_text()
