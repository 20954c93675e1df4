"""The parts of the report on adapters that draw, from the files of `vislora.report.pictures`."""

from pathlib import Path
from typing import Any

from vislora.files import read_json
from vislora.metrics.pictures import TITLES
from vislora.report.page import Section, details, drawing, paragraph, picture, side_by_side, table
from vislora.report.sections import before_and_after, configuration, moved

_SHARES = ("style_class", "content_class")
_INTERVALS = "95% intervals by the bootstrap over prompts; the kernel distance's by halves of prompts and reference"
_MEANING = {
    "style": "0: the base model's channel statistics, 1: the reference's",
    "content": "cosine similarity with the base model's picture from the same noise and prompt",
    "style_class": "share of the pictures that the style classifier takes for the wanted style",
    "content_class": "share that the content classifier takes for the prompt's label",
    "text_image": "100 times the cosine of CLIP's embeddings of picture and prompt",
    "kernel": "squared maximum mean discrepancy from the reference; 0 for pictures of the same kind",
    "frechet": "between Gaussians of the pictures' features and of the reference's",
    "drift": "cosine distance from the base model's pictures on prompts the adapter wasn't trained for",
    "diversity": "mean cosine distance between pictures of one prompt",
}


def told(key: str, figure: dict[str, Any] | None) -> str:
    """A figure in a few characters, with its interval."""
    if figure is None:
        return ""
    value, low, high = (None if end is None else _short(key, end) for end in figure.values())
    return value if low is None or low == high else f"{value} ({low} to {high})"


def _short(key: str, value: float) -> str:
    if key in _SHARES:
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{round(value, 2) + 0.0:.2f}"  # of -0.001 no sign is left


def picture_scores(out: Path) -> Section | None:
    """One table of what was compared, and what its figures mean and stand on."""
    found = read_json(out / "scores.json")
    if found is None:
        return None
    rows = found["rows"]
    keys = [key for key in TITLES if any(key in row["figures"] for row in rows)]
    cells = []
    for row in rows:
        figures = [told(key, row["figures"].get(key)) for key in keys]
        # the interval goes below its value
        cells.append([row["name"], str(row["pictures"]), *(text.replace(" (", "\n").rstrip(")") for text in figures)])
    header = ["", "pictures", *(TITLES[key] for key in keys)]
    html = table(header, cells, _INTERVALS)
    backbone = found["backbone"]
    html += paragraph(f"Features of {backbone['name']}, weights with SHA-256 {backbone['sha256']}.")
    said = f"Reference: {found['reference']}."
    if found["style"] is not None:
        said += f" The style that the classifier was to find: {found['style']}."
    html += paragraph(said)
    html += "".join(paragraph(f"Note: {warning}.") for warning in found["warnings"])
    html += details("What the figures are", "".join(paragraph(f"{TITLES[key]}: {_MEANING[key]}.") for key in keys))
    return Section("Scores", html)


def sweep(out: Path) -> Section | None:
    """The curves to choose a scale by."""
    said = {"sweep": "By features", "sweep_classes": "By classifiers"}
    shown = [
        drawing(out / f"{stem}.svg", f"{how}: each point is a scale, 0 the base model; bars are 95% intervals")
        for stem, how in said.items()
        if (out / f"{stem}.svg").is_file()
    ]
    return Section("Style against content", side_by_side(*shown)) if shown else None


def sheets(out: Path) -> Section | None:
    """The same prompts and noise, row by row."""
    found = read_json(out / "sheets" / "sheets.json")
    if not found:
        return None
    shown = [picture(out / "sheets" / s["file"], f"From top to bottom: {', '.join(s['rows'])}") for s in found]
    return Section("Samples", "".join(shown))


PICTURES = (picture_scores, before_and_after, sweep, sheets, moved, configuration)
