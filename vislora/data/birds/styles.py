"""The drawing styles by name; each paints a species in a scene at a size in pixels."""

from collections.abc import Callable

from PIL import Image

from .flat import flat
from .ink import ink
from .natural import natural
from .pixel import pixel
from .scene import Scene
from .species import Species
from .watercolour import watercolour

PAINTERS: dict[str, Callable[[Species, Scene, int], Image.Image]] = {
    "natural": natural,
    "flat": flat,
    "ink": ink,
    "watercolour": watercolour,
    "pixel": pixel,
}
STYLES = tuple(PAINTERS)
