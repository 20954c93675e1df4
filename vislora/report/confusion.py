"""The confusion matrix as a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from vislora.report.figures import new_figure, shortened, styled

_COUNTED = 40  # classes up to which every cell has its count
_NAMED = 120  # and up to which every row has its name


@styled()
def draw_confusion(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Counts [K, K] (row: true class, column: predicted), shaded by share of the row."""
    k = len(classes)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    names = [shortened(name) for name in classes] if k <= _NAMED else []
    margin = 0.9 + 0.085 * max(map(len, names), default=0)  # inches that the longest name may take
    side = min(max(4.0, 0.3 * k + margin), 22.0)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if names:
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if k <= _COUNTED:
        for i in range(k):
            for j in range(k):
                if count := int(confusion[i, j]):
                    colour = "#fffffe" if share[i, j] > 0.5 else "#08306b"  # no page's own: the cells stay light
                    axes.text(j, i, count, ha="center", va="center", fontsize=7, color=colour)
    return figure
