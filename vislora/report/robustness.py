"""Accuracy against the strength of corruptions."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vislora.report.figures import INK, new_figure, styled


@styled()
def draw_robustness(clean: float, top1: Mapping[str, Sequence[float]], mean: float) -> Figure:
    """Top-1 of each kind of corruption at strengths 1, 2, …, from the clean pictures' on; and its mean over all."""
    figure = new_figure(height=3.5)
    axes = figure.subplots()
    for kind, values in top1.items():
        axes.plot(range(len(values) + 1), [clean, *values], marker="o", markersize=3, label=kind)
    axes.axhline(mean, color=INK, alpha=0.5, linestyle="--", linewidth=0.9, label=f"mean {mean:.1%}")
    axes.set_xlabel("strength")
    axes.set_ylabel("top-1")
    axes.set_xticks(range(1 + max(len(values) for values in top1.values())))
    axes.set_ylim(0, 1.02)
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=4)  # anywhere within it would hide curves
    return figure
