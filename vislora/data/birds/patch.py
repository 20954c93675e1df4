"""What field marks are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .anatomy import Anatomy
from .colour import RGB
from .species import Mark


@dataclass(frozen=True)
class Patch:
    """A filled outline, or a line where `width` (in body lengths) is above 0."""

    points: np.ndarray  # [N, 2]
    colour: RGB
    width: float = 0.0


Painter = Callable[[Anatomy, Mark], list[Patch]]
