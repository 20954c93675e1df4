"""The report of a training or an evaluation, from the files in its folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from vislora.errors import first_three
from vislora.files import METRICS
from vislora.report.curves import draw_curves
from vislora.report.figures import save
from vislora.report.page import write_page
from vislora.report.sections import RUN, SCORES, Maker, gather


def write_run_report(run: Path) -> None:
    """Draw a training's curves into figures/, and write report.html."""
    file = run / METRICS
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    (run / "figures").mkdir(exist_ok=True)
    for name, figure in draw_curves(rows).items():
        save(figure, run / "figures" / f"curve_{name}")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    subtitle = f"{summary['model']}, {summary['adapter']}; vislora {summary['vislora']}, {summary['finished']}"
    write_page(run / "report.html", f"Training {run.parent.name} {run.name}", subtitle, gather(run, RUN))


def write_scores_report(out: Path, names: Sequence[str], subtitle: str, makers: Sequence[Maker] = SCORES) -> None:
    """Write report.html of an evaluation of adapters by these names, in the sections that `makers` make."""
    title = f"Evaluation of {first_three(names)}"
    write_page(out / "report.html", title, subtitle, gather(out, makers))
