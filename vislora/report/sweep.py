"""What an adapter gives and takes at each scale."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vislora.metrics.pictures import Estimate
from vislora.report.figures import COLOURS, INK, new_figure, shortened, styled

Points = Sequence[tuple[float, Estimate, Estimate]]
"""(scale, style, content) of one adapter, by scale."""


@styled()
def draw_sweep(curves: Mapping[str, Points], style: str, content: str) -> Figure:
    """Style against content, a curve for each adapter with its scales beside the points; bars are 95% intervals.

    Args:
        style, content: what the axes are called.
    """
    named = len(curves) > 1
    figure = new_figure(5.0, 4.0 + 0.2 * named * len(curves))
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        x, y = [point[2] for point in points], [point[1] for point in points]
        values = [f.value for f in x], [f.value for f in y]
        axes.plot(*values, color=colour, marker="o", markersize=4, label=shortened(name))
        for (scale, *_), across, up in zip(points, x, y, strict=True):
            _bars(axes, across, up, colour)
            axes.annotate(f"{scale:g}", (across.value, up.value), (5, 5), textcoords="offset points", color=INK)
    axes.set_xlabel(content)
    axes.set_ylabel(style)
    axes.grid(True)
    if named:
        figure.legend(loc="outside lower center")
    return figure


def _bars(axes: Axes, x: Estimate, y: Estimate, colour: str) -> None:
    if x.low is not None:
        axes.hlines(y.value, x.low, x.high, colour, linewidth=0.8, alpha=0.5)
    if y.low is not None:
        axes.vlines(x.value, y.low, y.high, colour, linewidth=0.8, alpha=0.5)
