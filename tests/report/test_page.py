"""Pages in a browser: they render, run their own script and nobody else's, and escape what came from outside."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from vislora.metrics.recognition import Predictions, evaluate_predictions
from vislora.report.confusion import draw_confusion
from vislora.report.evaluation import write_evaluation
from vislora.report.figures import new_figure, save
from vislora.report.page import (
    Section,
    code,
    details,
    drawing,
    key_figures,
    paragraph,
    picture,
    slider,
    table,
    write_page,
)
from vislora.report.sections import data, recognition

HOSTILE = (
    '<img src=x onerror="document.title=1">',
    "</title></script><script>document.title=1</script>",
    "'\"><svg onload=document.title=1>&amp; #000000",
    "--><b>ä 鳥</b>",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


def browse(path, profile, *options):
    """The document after its scripts have run, and what the console says."""
    words = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    words += f" --disable-component-update --enable-logging=stderr --v=0 --user-data-dir={profile} --dump-dom"
    command = [CHROMIUM, *words.split(), *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path):
    """Everything a report can hold, with hostile names throughout."""
    k = len(HOSTILE)
    predictions = Predictions(HOSTILE, torch.eye(k).roll(1, 0), torch.arange(k), HOSTILE)
    write_evaluation(evaluate_predictions(predictions, resamples=20), tmp_path / "scores")
    for name, value in (("before", 0), ("after", 255)):
        Image.fromarray(np.full((40, 60, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    figure = new_figure()
    figure.subplots().set_title(HOSTILE[3])
    save(figure, tmp_path / "drawn")
    parts = [
        paragraph(HOSTILE[0]),
        details(HOSTILE[1], paragraph(HOSTILE[2])),
        drawing(tmp_path / "drawn.svg", HOSTILE[2]),
        table(HOSTILE, [HOSTILE], HOSTILE[0]),
        code(HOSTILE[1]),
        key_figures([HOSTILE[:3]]),
        picture(tmp_path / "before.png", HOSTILE[0]),
        slider(tmp_path / "before.png", tmp_path / "after.png", HOSTILE[2]),
    ]
    sections = [Section(HOSTILE[1], "".join(parts)), Section("Scores", recognition(tmp_path / "scores"))]
    write_page(tmp_path / "report.html", HOSTILE[0], HOSTILE[1], sections)
    return tmp_path / "report.html"


def test_nothing_from_outside_becomes_markup(page):
    text = page.read_text()
    assert html.escape(HOSTILE[0]) in text
    for name in HOSTILE:
        assert name not in text
    assert text.count("<script>") == 1
    assert not re.search(r"<[a-z]+ [^>]*\son[a-z]+=", re.sub(r'"[^"]*"', '""', text))  # no handler outside of quotes


def test_names_like_colours_or_references_are_shown_as_they_are(tmp_path):
    names = ("#000000", "fill: #ffffff", 'id="1', "url(#2)")
    save(draw_confusion(torch.eye(4, dtype=torch.long), names), tmp_path / "drawn")
    shown = re.findall(r"<text [^>]*>([^<]*)</text>", drawing(tmp_path / "drawn.svg", "names"))
    assert {*names} < {*shown}


def test_of_very_many_files_with_something_odd_a_report_shows_some(tmp_path):
    items = [{"name": f"{i}.png", "what": "is odd"} for i in range(100_000)]
    finding = {"level": "note", "what": "odd files: 100,000", "remedy": "", "items": items}
    (tmp_path / "data.json").write_text(json.dumps({"pictures": {"train": 100_000}, "findings": [finding]}))
    shown = data(tmp_path).html
    assert "499.png" in shown
    assert "99,500 more in data.json" in shown
    assert len(shown) < 100_000


def test_a_page_needs_no_other_file_and_no_network(page):
    references = re.findall(r'(?:src|href)="([^"]*)"', page.read_text())
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_every_picture_has_an_alternative_text_and_every_id_is_its_own(page):
    text = page.read_text()
    assert all(re.search(r'\salt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", text))
    assert all(re.search(r'\saria-label="[^"]+"', drawing) for drawing in re.findall(r"<svg [^>]*role=[^>]*>", text))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', text)) <= set(ids)


@needs_browser
def test_a_browser_shows_it_without_an_error_and_runs_no_foreign_script(page, tmp_path):
    document, console = browse(page, tmp_path / "profile")
    assert console == []
    assert re.search(r"<title>([^<]*)</title>", document)[1] == html.escape(HOSTILE[0], quote=False)
    assert "--at: 50%" in document  # the slider's script ran
    assert document.count("<figure>") == 5


@needs_browser
def test_the_browser_would_tell_of_an_error(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><title>x</title><script>nothing()</script>")
    assert "nothing is not defined" in browse(broken, tmp_path / "profile")[1][0]
