"""The worst mistakes on one sheet."""

from collections.abc import Sequence

from PIL import Image

from vislora.metrics.recognition import Mistake
from vislora.report.sheets import Tile, contact_sheet


def mistake_sheet(mistakes: Sequence[Mistake], columns: int = 6) -> Image.Image:
    """Each picture over its true class, what it was taken for, and how surely."""
    tiles = [Tile(m.picture, (m.true, f"→ {m.predicted}", f"{m.probability:.0%}")) for m in mistakes]
    return contact_sheet(tiles, columns)
