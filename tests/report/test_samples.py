"""Sheets of pictures."""

import numpy as np
from PIL import Image

from vislora.report.samples import save_grid


def test_captions_have_letters_of_many_scripts(tmp_path):
    """What a font lacks is one and the same box."""
    seen = []
    for letter in "éñяжω→":
        save_grid([[Image.new("RGB", (40, 40), "white")]], [letter], tmp_path / "sheet.png")
        seen.append(np.asarray(Image.open(tmp_path / "sheet.png")).tobytes())
    assert len(set(seen)) == 6
