"""Woodpeckers; downy and hairy differ in bill and size alone."""

from ..species import Bill, Mark, Plan, Species
from .palette import BLACK, WHITE


def _checkered_woodpecker(
    name: str, length_cm: float, bill_length: float, head: float, tail_marks: tuple[Mark, ...]
) -> Species:
    """Downy and hairy wear one plumage; the bill against the head is what differs."""
    return Species(
        name,
        Plan(length_cm, depth=0.5, head=head, neck=0.33, tail=0.5, tail_width=0.08, tail_shape="wedge", leg=0.12),
        Bill("chisel", bill_length, 0.42, (52, 52, 56), (70, 70, 74)),
        upper=BLACK,
        under=(240, 238, 232),
        wing=BLACK,
        flight=(38, 37, 40),
        tail=BLACK,
        leg=(86, 88, 92),
        marks=(
            Mark("back", WHITE, 0.9),
            Mark("supercilium", WHITE, 1.1),
            Mark("moustache", WHITE, 1.15),
            Mark("ear", BLACK, 1.1),
            Mark("nape_spot", (206, 38, 32)),
            Mark("wing_spots", WHITE, 1.0, 5),
            Mark("outer_tail", WHITE),
            *tail_marks,
        ),
        poses=("clinging", "perched", "flying"),
        haunts=("trunk", "branch", "feeder", "snow"),
    )


WOODPECKERS = (
    Species(
        "red-headed woodpecker",
        Plan(23, depth=0.52, head=0.215, neck=0.35, tail=0.5, tail_width=0.085, tail_shape="wedge", leg=0.12),
        Bill("chisel", 1.0, 0.46, (150, 154, 160), (136, 140, 146)),
        upper=(34, 36, 52),
        under=WHITE,
        wing=(32, 34, 50),
        flight=(34, 34, 42),
        tail=(32, 32, 38),
        leg=(110, 110, 104),
        marks=(Mark("hood", (196, 24, 32), 0.92), Mark("rump", WHITE, 1.0), Mark("secondaries", WHITE, 1.0)),
        poses=("clinging", "perched", "flying"),
        haunts=("trunk", "branch", "wire"),
    ),
    _checkered_woodpecker("downy woodpecker", 16, 0.5, 0.22, (Mark("tail_band", BLACK, 0.5, 3),)),
    _checkered_woodpecker("hairy woodpecker", 24, 1.08, 0.205, ()),
)
