"""Draw the README's pictures of the drawn birds.

    python assets/contact_sheets.py

writes birds.png (every named species in three poses) and styles.png (some of them in every drawing style) beside
this file.
"""

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vislora.data.birds import SPECIES, STYLES, Species, draw, seeded_scene

PAPER, INK = (250, 249, 246), (52, 52, 56)
POSES = 3
STYLED = (
    "northern cardinal",
    "blue jay",
    "mallard",
    "barn owl",
    "american goldfinch",
    "great blue heron",
    "atlantic puffin",
)


def main() -> None:
    folder = Path(__file__).parent
    save(species_sheet(columns=4, cell=112), folder / "birds.png")
    save(style_sheet(cell=160), folder / "styles.png")


def species_sheet(columns: int, cell: int) -> Image.Image:
    """Each species' pictures in a row with its name under them, `columns` species abreast."""
    birds = list(SPECIES.values())
    rows = -(-len(birds) // columns)
    gap, line = 12, 22
    width, height = POSES * cell + gap, cell + line
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, species in enumerate(birds):
        x, y = gap + index % columns * width, gap + index // columns * height
        for place, seed in enumerate(varied_seeds(species)):
            sheet.paste(clean_picture(species, seed, cell), (x + place * cell, y))
        pen.text((x, y + cell + 2), species.name, fill=INK, font=font)
    return sheet


def clean_picture(species: Species, seed: int, cell: int) -> Image.Image:
    """Without camera noise, which would fill the file."""
    scene = replace(seeded_scene(species, seed, 0.15), noise=0.0, compression=0.0)
    return draw(species, scene, "natural", cell)


def varied_seeds(species: Species) -> list[int]:
    """Seeds of `POSES` scenes: as many different poses as the species has, then different places."""
    scenes = {seed: seeded_scene(species, seed, 0.15) for seed in range(60)}
    chosen: list[int] = []
    for trait in (lambda scene: scene.pose, lambda scene: scene.backdrop, lambda scene: scene.seed):
        for seed, scene in scenes.items():
            if len(chosen) < POSES and trait(scene) not in {trait(scenes[other]) for other in chosen}:
                chosen.append(seed)
    return chosen


def style_sheet(cell: int) -> Image.Image:
    """A column for each species, a row for each style, the same scene down a column."""
    label = 92
    sheet = Image.new("RGB", (label + len(STYLED) * cell, len(STYLES) * cell), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, name in enumerate(STYLED):
        species = SPECIES[name]
        scene = replace(seeded_scene(species, varied_seeds(species)[0], 0.1), noise=0.0, cover=0.0)
        for row, style in enumerate(STYLES):
            sheet.paste(draw(species, scene, style, cell), (label + column * cell, row * cell))
    for row, style in enumerate(STYLES):
        pen.text((8, row * cell + cell // 2 - 8), style, fill=INK, font=font)
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    # Six bits per channel look the same and halve the file; a palette would lose the rare colours of field marks.
    sheet.point(lambda value: min(255, (value + 2) // 4 * 4)).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
