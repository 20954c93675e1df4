"""Sheets of pictures."""

import numpy as np
from PIL import Image

from vislora.report.sheets import Tile, contact_sheet, save_grid


def test_captions_have_letters_of_many_scripts(tmp_path):
    """What a font lacks is one and the same box."""
    seen = []
    for letter in "éñяжω→":
        save_grid([[Image.new("RGB", (40, 40), "white")]], [letter], tmp_path / "sheet.png")
        seen.append(np.asarray(Image.open(tmp_path / "sheet.png")).tobytes())
    assert len(set(seen)) == 6


def test_captions_of_many_words_are_cut_and_rows_are_as_tall_as_their_lines(tmp_path):
    white = Image.new("RGB", (40, 40), "white")
    sheets = {}
    for words in (3, 40, 400):
        save_grid([[white, white], [white, white]], ["one", "word " * words], tmp_path / f"{words}.png")
        sheets[words] = np.asarray(Image.open(tmp_path / f"{words}.png"))
    assert sheets[3].shape[0] < sheets[40].shape[0]
    assert sheets[3].shape[1] == sheets[40].shape[1] == 2 * (160 + 6) + 6
    assert np.array_equal(sheets[40], sheets[400])
    tiles = [Tile(white, ("above",)), Tile(white, ()), Tile(white, ("a", "b", "c"))]
    assert contact_sheet(tiles, 1, 40).height == 3 * (40 + 6) + 4 * 15 + 6


def test_rows_have_their_names_under_each_picture_above_the_last_ones_captions(tmp_path):
    white = Image.new("RGB", (40, 40), "white")

    def sheet(names: list[str]) -> np.ndarray:
        save_grid([[white] * 2] * 2, ["one", "two"], tmp_path / "sheet.png", names)
        return np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))

    plain, named, swapped = sheet([]), sheet(["seed 3", "seed 14"]), sheet(["seed 14", "seed 3"])
    assert named.shape[0] == plain.shape[0] + 2 * 15
    row = 160 + 6 + 15
    for left in (6, 6 + 160 + 6):
        texts = [picture[row * r + 160 + 6 :][:15, left : left + 160] for picture in (named, swapped) for r in (0, 1)]
        assert all((text < 128).any() for text in texts)
        assert np.array_equal(texts[0], texts[3])
        assert np.array_equal(texts[1], texts[2])
        assert not np.array_equal(texts[0], texts[1])
    assert np.array_equal(named[-15 - 6 :], plain[-15 - 6 :])


def test_long_names_that_differ_at_one_end_are_told_apart():
    white = Image.new("RGB", (40, 40), "white")
    names = [
        f"{first} of a kind with a very long name {last}" for first in ("gull", "tern") for last in ("adult", "chick")
    ]
    sheets = [np.asarray(contact_sheet([Tile(white, (name,))], 1)) for name in names]
    assert len({sheet.tobytes() for sheet in sheets}) == 4
    margin = 6 + 144 + 2  # of the left, the picture, and what a letter may hang over
    assert all((sheet[:, margin:] == 255).all() for sheet in sheets)
