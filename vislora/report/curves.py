"""A run's figures against its steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vislora.report.figures import COLOURS, new_figure, styled

TITLES = {
    "loss": "training loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images/s",
    "val_loss": "validation loss",
    "val_top1": "validation top-1",
}


@styled()
def draw_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A figure of each quantity in the rows of metrics.jsonl, in their order; loss and val_loss share one."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "epoch")))
    figures = {}
    for key in keys:
        if key == "val_loss" and "loss" in keys:
            continue
        figure = new_figure(5.0, 2.7)
        axes = figure.subplots()
        _plot(axes, rows, key, 0)
        if key == "loss" and "val_loss" in keys:
            _plot(axes, rows, "val_loss", 1)
            axes.legend(["training", "validation"])
        axes.set_title("loss" if key == "loss" and "val_loss" in keys else TITLES.get(key, key))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
        figures[key] = figure
    return figures


def _plot(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: int) -> None:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    few = len(points) <= 40
    axes.plot(*zip(*points, strict=True), color=COLOURS[colour], marker="o" if few else None, markersize=3)
