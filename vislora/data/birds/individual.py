"""One bird of a species: its own proportions and plumage."""

from dataclasses import replace

from .colour import RGB, luminance, mix, shifted
from .scene import Individual
from .species import Mark, Species

_DRAB = (128, 112, 92)


def vary(species: Species, individual: Individual) -> Species:
    """`species` as this `individual` wears it."""
    if individual == Individual():
        return species
    plan = replace(
        species.plan,
        depth=species.plan.depth * individual.plumpness,
        head=species.plan.head * individual.head,
        tail=species.plan.tail * individual.tail,
        neck=species.plan.neck * individual.neck,
    )
    bill = replace(species.bill, length=species.bill.length * individual.bill)
    return replace(
        species,
        plan=plan,
        bill=bill,
        upper=_worn(species.upper, individual),
        under=_worn(species.under, individual),
        wing=_worn(species.wing, individual),
        flight=_worn(species.flight, individual),
        tail=_worn(species.tail, individual),
        marks=tuple(_worn_mark(mark, individual) for mark in species.marks),
    )


def _worn(colour: RGB, individual: Individual) -> RGB:
    """Young and worn feathers turn towards brown, keeping their lightness."""
    light = luminance(colour)
    drab = tuple(int(min(255, channel * (0.45 + 1.1 * light))) for channel in _DRAB)
    return shifted(mix(colour, drab, individual.dullness), individual.hue, individual.saturation, individual.brightness)


def _worn_mark(mark: Mark, individual: Individual) -> Mark:
    return replace(mark, colour=_worn(mark.colour, individual), size=mark.size * individual.mark)
