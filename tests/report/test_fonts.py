"""Names in scripts that matplotlib's own font lacks are drawn with another one where the system has it."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from vislora.report.figures import new_figure, save, styled
from vislora.report.fonts import installed
from vislora.report.sheets import save_grid


def bar(width):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (width, 700), (width, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


@pytest.fixture
def chinese(tmp_path, monkeypatch):
    """A font of two letters, bars of different widths, that the system seems to have."""
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "bird", "deer"])
    font.setupCharacterMap({ord("鳥"): "bird", ord("鹿"): "deer"})
    font.setupGlyf({".notdef": bar(400), "bird": bar(200), "deer": bar(800)})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "bird", "deer"), (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "noto.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    fontManager.addfont(tmp_path / "noto.ttf")


def pixels(file):
    return np.asarray(Image.open(file)).tobytes()


def test_letters_of_another_font_are_no_boxes_in_figures_and_on_sheets(chinese, tmp_path):
    seen = []
    for letter in "鳥鹿":
        with styled():
            figure = new_figure(1, 1)
            figure.text(0.1, 0.5, f"a {letter}")
        save(figure, tmp_path / "figure")
        save_grid([[Image.new("RGB", (40, 40), "white")]], [f"\n{letter}"], tmp_path / "sheet.png")
        seen.append((pixels(tmp_path / "figure.png"), pixels(tmp_path / "sheet.png")))
    assert all(bird != deer for bird, deer in zip(*seen, strict=True))


def test_fonts_that_are_not_there_are_not_asked_for(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name == "DejaVu Sans"])
    assert installed() == []
    with styled():
        figure = new_figure(1, 1)
        figure.text(0.1, 0.5, "鳥")
    save(figure, tmp_path / "figure")
    assert not caplog.records
