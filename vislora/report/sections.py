"""The parts of a report, each made from the files in a run's folder, where those are there.

To add one: a function from the folder to a Section (or None), and a place in `RUN`, `SCORES` or `PICTURES`.
"""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vislora.files import SETTINGS, read_json
from vislora.report.curves import TITLES
from vislora.report.page import (
    Section,
    code,
    details,
    drawing,
    key_figures,
    paragraph,
    picture,
    side_by_side,
    slider,
    table,
)

Maker = Callable[[Path], Section | list[Section] | None]
PROBED = ", linear probe"  # behind the name of the adapter beside which one is scored
_PREVIEWS = 8  # sample grids shown, of all there are
_ITEMS = 500  # files of a finding shown, likewise: of a large data set there may be a million
_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "ece": "calibration error",
}


def run_figures(run: Path) -> Section | None:
    """The run in numbers."""
    if (summary := read_json(run / "summary.json")) is None:
        return None
    scores = read_json(run / "evaluation" / "evaluation.json")
    figures = [] if scores is None else _scored(scores)[:1]
    share = summary["trainable"] / summary["parameters"]
    figures += [
        ("trained parameters", f"{summary['trainable']:,}", f"{share:.2%} of {summary['parameters']:,}"),
        ("training", _duration(summary["train_s"]), f"{_duration(summary['total_s'])} with everything around it"),
        ("peak memory", f"{summary['peak_memory_gb']:.2f} GB", summary["memory_of"]),
        ("computed in", summary["precision"], summary["device"]),
    ]
    return Section("In numbers", key_figures(figures))


def curves(run: Path) -> Section | None:
    """What was logged, against the step."""
    drawings = _drawings(run / "figures", "curve_*.svg")
    if not drawings:
        return None
    names = [file.stem.removeprefix("curve_") for file in drawings]
    shown = [
        drawing(file, f"{TITLES.get(name, name)} against the step") for file, name in zip(drawings, names, strict=True)
    ]
    return Section("Curves", side_by_side(*shown))


def samples(run: Path) -> Section | None:
    """Grids of what was drawn along the way, in previews/NAME_STEP.png or the like, in the order of their names."""
    files = sorted((run / "previews").glob("*.png"))
    if not files:
        return None
    last = len(files) - 1
    chosen = sorted({round(i * last / (_PREVIEWS - 1)) for i in range(_PREVIEWS)})
    return Section("Samples", "".join(picture(files[i], _told(files[i].stem)) for i in chosen))


def before_and_after(run: Path) -> Section | None:
    """Pairs in before_after/: NAME.before.png and NAME.after.png, of one size, under what captions.json says."""
    befores = sorted((run / "before_after").glob("*.before.png"))
    if not befores:
        return None
    captions = read_json(run / "before_after" / "captions.json") or {}
    shown = []
    for before in befores:
        name = before.name.removesuffix(".before.png")
        after = before.with_name(f"{name}.after.png")
        shown.append(slider(before, after, captions.get(name, name.replace("_", " "))))
    note = "Without and with the adapter, from the same noise. Drag, or move with the arrow keys."
    return Section("Before and after", paragraph(note) + side_by_side(*shown))


def run_evaluation(run: Path) -> Section | None:
    """What the test split says."""
    if not (run / "evaluation" / "evaluation.json").is_file():
        return None
    return Section("On the test split", recognition(run / "evaluation"))


def updates(run: Path) -> Section | None:
    """How far training moved each layer."""
    layers = read_json(run / "updates.json")
    if not layers:
        return None
    shares = ["" if u["relative"] is None else f"{u['relative']:.2%}" for u in layers]
    rows = [[u["layer"], f"{u['update']:.4g}", f"{u['base']:.4g}", s] for u, s in zip(layers, shares, strict=True)]
    header = ["layer", "‖ΔW‖", "‖W₀‖", "‖ΔW‖ / ‖W₀‖"]
    shown = drawing(run / "updates.svg", "Frobenius norm of each layer's update, over that of its frozen weight")
    return Section("What training moved", side_by_side(shown, table(header, rows)))


def data(run: Path) -> Section | None:
    """What was learned from, and what the check before the first step found."""
    found = read_json(run / "data.json")
    if found is None:
        return None
    html = paragraph(", ".join(f"{split}: {count:,} pictures" for split, count in found["pictures"].items()))
    if [*found["pictures"]] == ["train"]:
        html += paragraph("Nothing was held out to measure on; data.val_fraction holds some of the pictures out.")
    for finding in found["findings"]:
        said = f"{finding['level']}: {finding['what']} {finding['remedy']}".strip()
        items = [[item["name"], item["what"]] for item in finding["items"][:_ITEMS]]
        if (more := len(finding["items"]) - _ITEMS) > 0:
            items.append([f"… {more:,} more in data.json", ""])
        html += details(said, table(["", "what"], items)) if items else paragraph(said)
    return Section("Data", html)


def configuration(run: Path) -> Section | None:
    """Every setting."""
    if not (run / SETTINGS).is_file():
        return None
    return Section("Configuration", code((run / SETTINGS).read_text(encoding="utf-8")))


def all_scores(out: Path) -> Section | None:
    """One table of what was compared."""
    rows = read_json(out / "scores.json")
    if not rows:
        return None
    header = ["", "data", "images", *_NAMES.values(), "nll"]
    shown = []
    for row in rows:
        cells = [_with_interval(row[key], row["intervals"][key]) for key in _NAMES]
        shown.append([row["name"], row["data"], f"{row['images']:,}", *cells, f"{row['nll']:.3f}"])
    note = (
        "95% intervals over images (Wilson's of top-1 and top-5, the bootstrap's of the others); what another training "
        "changes isn't in them."
    )
    html = table(header, shown, note)
    for row in rows:
        if count := row.get("learned"):
            told = (
                f"{row['name']} learned {count:,} of the {row['images']:,} images of {row['data']}, or copies of them"
            )
            html += paragraph(f"{told}: its figures there don't tell how it does on new ones.")
    if any(row["name"].endswith(PROBED) for row in rows):
        html += paragraph("Linear probes are fitted to the train split of the data that they are scored on.")
    compared = [row for row in rows if row.get("differences")]
    if compared:
        cells = [
            [row["name"], row["data"], row["compared_with"], *(_signed(*row["differences"][key]) for key in _NAMES)]
            for row in compared
        ]
        note = "Differences in percentage points, on the same images; their 95% intervals by the paired bootstrap."
        html += table(["", "data", "less", *_NAMES.values()], cells, note)
    return Section("Scores", html)


def each_score(out: Path) -> list[Section]:
    """A section for each row of the table, the details of all but the first folded away."""
    sections = []
    for i, row in enumerate(read_json(out / "scores.json") or []):
        html = recognition(out / row["folder"])
        title = f"{row['name']} on {row['data']}"
        sections.append(Section(title, html if i == 0 else details("figures and mistakes", html)))
    return sections


def robustness(out: Path) -> Section | None:
    """Accuracy under corruptions, for each row that was tried."""
    rows = [row for row in read_json(out / "scores.json") or [] if row.get("robustness")]
    if not rows:
        return None
    kinds = list(rows[0]["robustness"]["top1"])
    cells = []
    for row in rows:
        found = row["robustness"]
        means = [f"{sum(found['top1'][kind]) / len(found['top1'][kind]):.1%}" for kind in kinds]
        cells.append([row["name"], row["data"], f"{row['top1']:.1%}", f"{found['mean']:.1%}", *means])
    shown = [
        drawing(out / row["folder"] / "robustness.svg", f"{row['name']} on {row['data']}: top-1 by strength")
        for row in rows
    ]
    header = ["", "data", "clean", "mean under corruption", *kinds]
    return Section("Robustness", table(header, cells, "top-1, mean over five strengths") + side_by_side(*shown))


def moved(out: Path) -> list[Section]:
    """`updates` and maps of each adapter that was compared."""
    sections = []
    for row in read_json(out / "adapters.json") or []:
        html = ""
        if (section := updates(out / row["folder"])) is not None:
            html += section.html
        if (out / row["folder"] / "maps.png").is_file():
            html += picture(
                out / row["folder"] / "maps.png",
                "Integrated gradients of the predicted class's logit: red pixels speak for it, blue ones against it. "
                f"{row['maps']}",
            )
        if html:
            sections.append(Section(f"{row['name']}: what changed", html))
    return sections


def recognition(folder: Path) -> str:
    """What `Evaluation.write` left, as HTML."""
    scores = read_json(folder / "evaluation.json")
    html = key_figures(_scored(scores))
    figures = [drawing(folder / "reliability.svg", "Accuracy against confidence, and the share of images in each bin")]
    if (folder / "mistakes.png").is_file():
        figures.append(picture(folder / "mistakes.png", "The most confident mistakes: true class → predicted class"))
    html += side_by_side(*figures)
    html += drawing(folder / "confusion.svg", "Confusion matrix: counts, shaded by share of the true class", wide=True)
    rows = [
        [name, f"{c['images']:,}"] + [f"{c[key]:.1%}" if c["images"] else "-" for key in ("precision", "recall", "f1")]
        for name, c in scores["per_class"].items()
    ]
    html += details("Figures of each class", table(["class", "images", "precision", "recall", "F1"], rows))
    return html + details("Largest confusions", _largest_confusions(folder / "confusion.csv"))


RUN: tuple[Maker, ...] = (
    run_figures,
    curves,
    samples,
    before_and_after,
    run_evaluation,
    updates,
    data,
    configuration,
)
SCORES: tuple[Maker, ...] = (
    all_scores,
    robustness,
    each_score,
    moved,
    configuration,
)


def gather(folder: Path, makers: Sequence[Maker]) -> list[Section]:
    """The sections there is something for."""
    sections: list[Section] = []
    for make in makers:
        found = make(folder)
        sections += found if isinstance(found, list) else [found] if found is not None else []
    return sections


def _scored(scores: dict[str, Any]) -> list[tuple[str, str, str]]:
    figures = []
    for key, name in _NAMES.items():
        low, high = scores["intervals"][key]
        figures.append((name, f"{scores[key]:.1%}", f"95%: {low:.1%} to {high:.1%}"))
    if (fitted := scores["calibrated"]) is not None:
        remark = f"calibration error {fitted['ece']:.1%} with it"
        figures.append(("temperature", f"{fitted['temperature']:.2f}", remark))
    speed = scores["images_per_s"]
    figures.append(("images", f"{scores['images']:,}", "" if speed is None else f"{speed:,.0f} a second"))
    return figures


def _told(stem: str) -> str:
    """The name of a file in words: of step_00000030 "step 30"."""
    return re.sub(r"_0*(?=\d)", " ", stem).replace("_", " ")


def _largest_confusions(file: Path, count: int = 20) -> str:
    with file.open(newline="", encoding="utf-8") as lines:
        (_, *names), *rows = csv.reader(lines)
    pairs = [
        (int(cell), row[0], names[k])
        for i, row in enumerate(rows)
        for k, cell in enumerate(row[1:])
        if k != i and int(cell)
    ]
    if not pairs:
        return paragraph("None: every image was classified rightly.")
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:count]
    return table(["true", "predicted", "images"], [[true, predicted, str(n)] for n, true, predicted in pairs])


def _drawings(folder: Path, pattern: str) -> list[Path]:
    first = ("curve_loss", "curve_val_top1")
    found = sorted(folder.glob(pattern), key=lambda file: file.stem)
    return sorted(found, key=lambda file: first.index(file.stem) if file.stem in first else len(first))


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1%}\n{interval[0] * 100:.1f} to {interval[1] * 100:.1f}"


def _signed(value: float, low: float, high: float) -> str:
    return f"{value * 100:+.1f}\n{low * 100:+.1f} to {high * 100:+.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
