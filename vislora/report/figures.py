"""Figures as files, PNG for slides and SVG for pages; how they look."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from vislora.names import without_middle
from vislora.report.fonts import installed

# distinguishable with red-green blindness, on white and on near-black alike
COLOURS = ("#2f7fd1", "#e07b00", "#1a9c78", "#c2508f", "#8a6fd1", "#9a8424", "#6d7a86", "#d1493f")
INK = "#000000"  # a page's SVG takes the text's colour instead
PAPER = "#ffffff"  # and leaves this out
_LONGEST = 48  # letters of a name that are shown

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,  # a grid behind the bars
    "lines.linewidth": 1.6,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # class names come from folders: "$" would be read as mathematics
    "svg.fonttype": "none",  # text stays text: small, and read aloud
    "svg.hashsalt": "vislora",  # the same figure, the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib drawing in the style of the reports."""
    with matplotlib.rc_context(_STYLE | {"font.family": ["sans-serif", *installed()]}):
        yield


def new_figure(width: float = 5.0, height: float = 3.1) -> Figure:
    """An empty figure; sizes in inches. Wide enough for a phone's screen by default."""
    return Figure(figsize=(width, height), layout="constrained")


def shortened(name: str) -> str:
    """A name that leaves room for the rest of a figure."""
    return name if len(name) <= _LONGEST else without_middle(name, _LONGEST)


def save(figure: Figure, stem: Path) -> None:
    """Write STEM.png and STEM.svg."""
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box in the PNG; the SVG has the text itself
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=130)
        figure.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None})
