"""Drawn birds: parametric species with their field marks, in five drawing styles.

A seed gives the same picture everywhere.
"""

from .draw import draw, picture, seeded_scene, silhouette
from .invented import invented
from .named import SPECIES
from .scene import Scene, caption, sample_scene
from .species import Species
from .styles import STYLES

__all__ = [
    "SPECIES",
    "STYLES",
    "Scene",
    "Species",
    "caption",
    "draw",
    "invented",
    "picture",
    "sample_scene",
    "seeded_scene",
    "silhouette",
]
