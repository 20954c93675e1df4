"""A run's figures against its steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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


_NOISY = ("loss", "grad_norm")  # of single steps, which hide where they lead
_FEW = 40  # points that are marked


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
        _plot(axes, rows, key, 0, "training")
        if key == "loss" and "val_loss" in keys:
            _plot(axes, rows, "val_loss", 1, "validation")
            axes.legend()
        axes.set_title("loss" if key == "loss" and "val_loss" in keys else TITLES.get(key, key))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
        figures[key] = figure
    return figures


def _plot(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: int, label: str) -> None:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = zip(*points, strict=True)
    style: dict[str, Any] = {"color": COLOURS[colour]}
    if key in _NOISY and len(points) > _FEW:
        axes.plot(steps, values, alpha=0.3, linewidth=0.8, **style)
        width = max(3, len(points) // 25)
        axes.plot(steps, _running_mean(values, width), label=f"{label}, mean of {width} steps", **style)
    else:
        axes.plot(steps, values, label=label, marker="o" if len(points) <= _FEW else None, markersize=3, **style)


def _running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Of so many values around each; of those that there are, at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
