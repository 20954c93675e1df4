"""How far an adapter moved each layer, as a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from vislora.files import write_json
from vislora.metrics.updates import LayerUpdate
from vislora.report.figures import COLOURS, new_figure, save, styled

_MOST = 96  # layers with a bar of their own


@styled()
def draw_updates(updates: Sequence[LayerUpdate]) -> Figure:
    """||dW|| / ||W0|| of each adapted layer, from the first to the last."""
    shown = updates[:_MOST]
    figure = new_figure(5.0, min(max(2.2, 0.19 * len(shown) + 0.7), 18.0))
    axes = figure.subplots()
    axes.barh(range(len(shown)), [update.relative or 0.0 for update in shown], color=COLOURS[0])
    axes.set_yticks(range(len(shown)), [update.layer for update in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)  # the first on top; a margin would grow with the number of bars
    axes.set_xlabel("‖ΔW‖ / ‖W₀‖")
    if len(updates) > _MOST:  # over the whole width: long names leave the axes little
        figure.suptitle(f"the first {_MOST} of {len(updates)} layers", fontsize=9)
    axes.grid(True, axis="x")
    return figure


def write_updates(updates: Sequence[LayerUpdate], folder: Path) -> None:
    """Write updates.json, updates.svg and updates.png."""
    rows = [asdict(update) | {"relative": update.relative} for update in updates]
    write_json(rows, folder / "updates.json")
    save(draw_updates(updates), folder / "updates")
