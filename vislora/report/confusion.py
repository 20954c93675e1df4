"""The confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw counts [K, K] (row: true class, column: predicted), shaded by share of the row."""
    k = len(classes)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = max(4.0, 0.36 * k + 2.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    # class names come from folders: "$" would be read as mathematics
    axes.set_xticks(range(k), classes, rotation=90, parse_math=False)
    axes.set_yticks(range(k), classes, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if k <= 40:  # more would be unreadable
        for i in range(k):
            for j in range(k):
                if count := int(confusion[i, j]):
                    axes.text(
                        j, i, count, ha="center", va="center", fontsize=7, color="w" if share[i, j] > 0.5 else "k"
                    )
    figure.savefig(path, dpi=110)
