"""The parts of a report say what the files in a run's folder hold."""

from PIL import Image

from vislora.report.sections import samples


def test_a_preview_is_called_by_its_step(tmp_path):
    (tmp_path / "previews").mkdir()
    for stem in ("step_00000000", "step_00000390"):
        Image.new("RGB", (8, 8)).save(tmp_path / "previews" / f"{stem}.png")
    html = samples(tmp_path).html
    assert html.index("<figcaption>step 0</figcaption>") < html.index("<figcaption>step 390</figcaption>")
