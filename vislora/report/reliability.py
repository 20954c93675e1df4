"""The reliability diagram: accuracy against confidence."""

import numpy as np
from matplotlib.figure import Figure

from vislora.metrics.calibration import BINS, Calibration
from vislora.report.figures import COLOURS, INK, new_figure, styled


@styled()
def draw_reliability(plain: Calibration, calibrated: Calibration | None = None) -> Figure:
    """Each bin's accuracy at its mean confidence, over the share of images in it; on the diagonal where
    probabilities mean what they say."""
    figure = new_figure(5.0, 4.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], "--", color=INK, alpha=0.4, linewidth=0.8)
    edges = np.arange(BINS) / BINS
    for shown, colour, marker in ((plain, COLOURS[0], "o"), (calibrated, COLOURS[1], "s")):
        if shown is None:
            continue
        filled = np.array(shown.images) > 0
        what = "as it is" if shown is plain else f"temperature {shown.temperature:.2f}"
        points = np.array(shown.confidence)[filled], np.array(shown.accuracy)[filled]
        upper.plot(*points, marker=marker, markersize=4, color=colour, label=f"{what}: ECE {shown.ece:.1%}")
        share = np.array(shown.images) / sum(shown.images)
        if shown is plain:
            lower.bar(edges, share, 1 / BINS, align="edge", color=colour, alpha=0.5)
        else:
            lower.stairs(share, np.arange(BINS + 1) / BINS, color=colour, linewidth=1.2)
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    upper.legend(loc="best")
    lower.set_ylabel("share")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.grid(True)
    return figure
