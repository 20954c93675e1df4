"""An evaluation's folder: its figures, and what there is to see of them as pictures."""

from pathlib import Path

from vislora.metrics.recognition import Evaluation
from vislora.report.confusion import draw_confusion
from vislora.report.figures import save
from vislora.report.mistakes import mistake_sheet
from vislora.report.reliability import draw_reliability


def write_evaluation(found: Evaluation, folder: Path) -> None:
    """Write what `Evaluation.write` does; the confusion matrix and the reliability curve as .png and .svg; the worst
    mistakes as mistakes.png, where there are any."""
    found.write(folder)
    save(draw_confusion(found.confusion, found.classes), folder / "confusion")
    save(draw_reliability(found.calibration, found.calibrated), folder / "reliability")
    if found.mistakes:
        mistake_sheet(found.mistakes).save(folder / "mistakes.png")
    else:  # of a run that went on in its folder there may be earlier ones
        (folder / "mistakes.png").unlink(missing_ok=True)
