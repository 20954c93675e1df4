"""Named species after their field marks in adult breeding plumage, male where the sexes differ."""

from ..species import Species
from .aerialists import AERIALISTS
from .finches import FINCHES
from .songbirds import SONGBIRDS
from .waterbirds import WATERBIRDS
from .woodpeckers import WOODPECKERS

SPECIES: dict[str, Species] = {
    species.name: species for species in (*SONGBIRDS, *FINCHES, *WOODPECKERS, *WATERBIRDS, *AERIALISTS)
}
