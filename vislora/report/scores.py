"""An evaluation's folder: one table, a folder for each of its rows, the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image

from vislora import __version__
from vislora.config.commands import Corruption, EvaluateConfig
from vislora.files import SETTINGS, write_json, write_rows, write_text
from vislora.metrics.intervals import FIGURES, differences
from vislora.metrics.recognition import Evaluation
from vislora.metrics.updates import LayerUpdate
from vislora.names import aligned
from vislora.report.before_after import file_name
from vislora.report.evaluation import write_evaluation
from vislora.report.figures import save
from vislora.report.robustness import draw_robustness
from vislora.report.updates import write_updates
from vislora.report.write import write_scores_report


@dataclass(frozen=True)
class Scored:
    """A row of the table.

    Attributes:
        name: of what was scored: the adapter's, with the baseline's behind it.
        data: name of the data set.
        pictures: the settings that decide which those are.
        evaluation: its figures.
        robustness: top-1 by corruption, at strengths 1 to 5; empty where none was tried.
        learned: how many of the pictures were learned in training; None where it can't be told.
    """

    name: str
    data: str
    pictures: dict[str, Any]
    evaluation: Evaluation
    robustness: dict[Corruption, list[float]]
    learned: int | None


@dataclass(frozen=True)
class Adapted:
    """What is told of an adapter itself: norms of its updates (none where the whole model was trained), and a sheet of
    what it looks at."""

    name: str
    updates: list[LayerUpdate]
    maps: Image.Image | None


def write_scores(rows: Sequence[Scored], adapted: Sequence[Adapted], config: EvaluateConfig, out: Path) -> None:
    """Write everything about an evaluation into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), out / SETTINGS)
    table = [_row(i, row, rows, config) for i, row in enumerate(rows)]
    for row, values in zip(rows, table, strict=True):
        folder = out / values["folder"]
        write_evaluation(row.evaluation, folder)
        if values["robustness"] is not None:
            save(
                draw_robustness(row.evaluation.top1, values["robustness"]["top1"], values["robustness"]["mean"]),
                folder / "robustness",
            )
    write_json(table, out / "scores.json")
    _write_table(table, out / "scores.csv")
    write_json([_write_adapted(i, a, out) for i, a in enumerate(adapted)], out / "adapters.json")
    names = list(dict.fromkeys(scored.name for scored in adapted or rows))
    subtitle = f"split {config.split}; vislora {__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    write_scores_report(out, names, subtitle)


def scores_table(rows: Sequence[Scored]) -> str:
    """The table for a terminal."""
    calibrated = any(row.evaluation.calibrated for row in rows)
    spoiled = any(row.robustness for row in rows)
    cells = [["", "", "images", "top-1 (95%)", "top-5", "balanced", "macro F1", "ECE"]]
    cells[0] += ["calibrated (T)"] * calibrated + ["corrupted"] * spoiled + ["images/s"]
    for row in rows:
        e = row.evaluation
        low, high = e.intervals["top1"]
        fitted = f"{e.calibrated.ece:.1%} ({e.calibrated.temperature:.2f})" if e.calibrated else ""
        mean = f"{mean_top1(row.robustness):.1%}" if row.robustness else ""
        speed = "" if e.images_per_s is None else f"{e.images_per_s:.0f}"
        figures = [f"{figure:.1%}" for figure in (e.top5, e.balanced_accuracy, e.macro_f1, e.calibration.ece)]
        cells.append([row.name, row.data, str(e.count), f"{e.top1:.1%} ({low:.1%}-{high:.1%})", *figures])
        cells[-1] += [fitted] * calibrated + [mean] * spoiled + [speed]
    return "\n".join(aligned(cells, left=2))


def mean_top1(robustness: dict[Any, list[float]]) -> float:
    """Mean corruption accuracy: over all kinds and strengths."""
    values = [value for values in robustness.values() for value in values]
    return sum(values) / len(values)


def _row(index: int, row: Scored, rows: Sequence[Scored], config: EvaluateConfig) -> dict[str, Any]:
    values = row.evaluation.to_dict()
    del values["per_class"], values["calibration"]
    # compared with the first row of the same images, where that has the same classes
    first = next(other for other in rows if other.data == row.data)
    one, other = row.evaluation.predictions, first.evaluation.predictions
    paired = None
    if row is not first and _same_images(row, first):
        found = differences(one.in_order_of(other.classes).outcomes(), other.outcomes(), config.resamples, config.seed)
        ours, theirs = row.evaluation.to_dict(), first.evaluation.to_dict()
        paired = {key: [ours[key] - theirs[key], *found[key]] for key in FIGURES}
    spoiled = None
    if row.robustness:
        by_kind = {kind.value: top1 for kind, top1 in row.robustness.items()}
        spoiled = {"mean": mean_top1(row.robustness), "top1": by_kind}
    folder = _folder(index, f"{row.name} {row.data}")
    about = {"name": row.name, "data": row.data, "folder": folder, "learned": row.learned}
    return about | values | {"robustness": spoiled, "compared_with": first.name, "differences": paired}


def _same_images(row: Scored, other: Scored) -> bool:
    """Whether two rows are of the same pictures with the same labels, so that they can be compared picture by
    picture."""
    mine, theirs = row.evaluation.predictions, other.evaluation.predictions
    if row.pictures != other.pictures or set(mine.classes) != set(theirs.classes) or mine.names != theirs.names:
        return False
    return torch.equal(mine.in_order_of(theirs.classes).labels, theirs.labels)


def _write_table(table: list[dict[str, Any]], file: Path) -> None:
    intervals = [f"{key}_{end}" for key in FIGURES for end in ("low", "high")]
    fitted = ("temperature", "ece", "nll")
    calibrated = ("temperature", "calibrated_ece", "calibrated_nll")
    rows = [["name", "data", "images", *FIGURES, "nll", *intervals, *calibrated, "corrupted_top1", "images_per_s"]]
    for row in table:
        ends = [end for key in FIGURES for end in row["intervals"][key]]
        figures = [row[key] for key in (*FIGURES, "nll")]
        spoiled = row["robustness"]["mean"] if row["robustness"] else ""
        own = ["" if row["calibrated"] is None else row["calibrated"][key] for key in fitted]
        rows.append([row["name"], row["data"], row["images"], *figures, *ends, *own, spoiled, row["images_per_s"]])
    write_rows(rows, file)


def _write_adapted(index: int, adapted: Adapted, out: Path) -> dict[str, str]:
    folder = _folder(index, f"adapter {adapted.name}")
    (out / folder).mkdir(exist_ok=True)
    if adapted.updates:
        write_updates(adapted.updates, out / folder)
    if adapted.maps is not None:
        adapted.maps.save(out / folder / "maps.png")
    rows = "the picture, the base model under the adapter's head, the adapted model" if adapted.updates else "the model"
    return {"name": adapted.name, "folder": folder, "maps": f"From top to bottom: {rows}."}


def _folder(index: int, name: str) -> str:
    return f"{index + 1:02d}_{file_name(name)}"
