"""One scene painted without light: every style starts from this plate."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .curves import Frame
from .figure import Figure, figure
from .foreground import set_foreground
from .individual import vary
from .perches import set_stage
from .scene import Scene
from .sheet import Sheet, Stencil
from .species import Species
from .stage import Stage


@dataclass(frozen=True)
class Plate:
    """Square images of one size: colours (RGB), and L masks of the bird, its wing and the ink lines."""

    image: Image.Image
    bird: Image.Image
    wing: Image.Image
    ink: Image.Image
    extent: float  # the bird's longer side as a share of the picture's


def paint_plate(species: Species, scene: Scene, ground: Image.Image, softness: float = 0.0, line: int = 0) -> Plate:
    """Paint perch, bird and cover.

    Args:
        ground: the backdrop, square; painted over in place.
        softness: blur of field marks, in plate pixels.
        line: width of the ink lines in plate pixels, 0 for none.
    """
    pixels = ground.width
    species = vary(species, scene.individual)
    bird = figure(species, scene)
    place, box = _place(bird, scene, pixels)
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    sheet = Sheet(ground, softness, line)
    unit = place.unit
    stage = Stage(
        sheet,
        scene,
        rng,
        pixels,
        feet=place.at(bird.feet),
        bill_tip=place.at(bird.bill_tip),
        bird=box,
        body=unit,
        cm=unit / (0.5 * species.plan.length_cm),
        forward=1.0 if scene.facing == "right" else -1.0,
    )
    set_stage(stage)
    before = sheet.image.copy() if bird.waterline is not None else None
    masks = {name: Image.new("L", (pixels, pixels), 0) for name in ("bird", "wing")}
    for part in bird.parts:
        patches = [replace(patch, points=place.at(patch.points)) for patch in part.patches]
        stencil = sheet.shape([place.at(outline) for outline in part.outlines], part.colour, patches, unit)
        if stencil is None:
            continue
        _stamp(masks["bird"], stencil, 255)
        if part.name == "wing":
            _stamp(masks["wing"], stencil, 255)
    if before is not None:
        _sink(sheet, before, masks, round(float(place.at((0.0, bird.waterline))[1])))
    for stencil in set_foreground(stage):
        for mask in masks.values():
            _stamp(mask, stencil, 0)
    return Plate(sheet.image, masks["bird"], masks["wing"], sheet.ink, float((box[1] - box[0]).max()) / pixels)


def _place(bird: Figure, scene: Scene, pixels: int) -> tuple[Frame, np.ndarray]:
    """The figure's frame on the plate and the bird's box there, corners [2, 2]."""
    low, high = bird.extent()
    scale = scene.scale * pixels / (high - low).max()
    mirror = 1.0 if scene.facing == "right" else -1.0
    axes = np.array([[scale * mirror, 0.0], [0.0, scale]])
    origin = np.array([scene.x, scene.y]) * pixels - axes @ ((low + high) / 2)
    half = (high - low) * scale / 2
    centre = np.array([scene.x, scene.y]) * pixels
    return Frame(axes, origin), np.stack([centre - half, centre + half])


def _stamp(mask: Image.Image, stencil: Stencil, value: int) -> None:
    mask.paste(value, stencil.corner, stencil.mask)


def _sink(sheet: Sheet, before: Image.Image, masks: dict[str, Image.Image], level: int) -> None:
    """Below `level` there is water again, with the bird's dim reflection in it."""
    width, height = sheet.image.size
    if not 0 < level < height:
        return
    depth = min(level, height - level)
    above = (0, level - depth, width, level)
    mirrored = Image.Transpose.FLIP_TOP_BOTTOM
    reflection = sheet.image.crop(above).transpose(mirrored)
    dim = masks["bird"].crop(above).transpose(mirrored).point(lambda value: value * 2 // 5)
    water = before.crop((0, level, width, height))
    water.paste(reflection, (0, 0), dim)
    sheet.image.paste(water, (0, level))
    for mask in (*masks.values(), sheet.ink):
        mask.paste(0, (0, level, width, height))
    ripple = masks["bird"].crop((0, level - 1, width, level))
    sheet.image.paste((214, 224, 228), (0, level), ripple)
