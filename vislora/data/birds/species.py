"""What a kind of bird is: a body plan, a bill, ground colours and field marks."""

from dataclasses import dataclass

from .colour import RGB


@dataclass(frozen=True)
class Plan:
    """Proportions. Lengths are in body lengths (breast to rump, without head and tail), angles in degrees."""

    length_cm: float = 16.0  # of the living bird; sets how big leaves and twigs look beside it
    depth: float = 0.56
    head: float = 0.215  # radius
    head_shape: float = 1.0  # length over height: 1 round, 1.4 a heron's
    neck: float = 0.34  # from shoulder to the head's centre
    neck_width: float = 0.19  # half width, halfway
    neck_bend: float = 0.0  # 0 straight, 1 a heron's S
    upright: float = 38.0  # body angle when perched
    stance: float = 22.0  # body angle when standing
    crest: str = "none"  # none, peak, tuft, plume
    crest_length: float = 0.0  # in head radii
    tail: float = 0.55
    tail_width: float = 0.085  # half width
    tail_shape: str = "notched"  # notched, square, rounded, forked, wedge
    primaries: float = 0.12  # how far the folded wing reaches beyond the rump
    span: float = 1.05  # one spread wing
    chord: float = 0.46
    pointed: float = 0.5  # 0 broad and fingered, 1 a swallow's sickle
    leg: float = 0.2
    leg_width: float = 0.022
    face: str = "side"  # side, or front for owls


@dataclass(frozen=True)
class Bill:
    """Shape is a row of `bills.SHAPES`; length and depth are in head radii."""

    shape: str
    length: float
    depth: float
    upper: RGB
    lower: RGB
    tip: RGB | None = None


@dataclass(frozen=True)
class Mark:
    """One field mark: a row of `marks.MARKS`, its colour, how large (1 = usual) and a count where marks repeat."""

    kind: str
    colour: RGB
    size: float = 1.0
    count: int = 1


@dataclass(frozen=True)
class Species:
    """A kind of bird. Colours are RGB 0-255; marks are painted in the order given."""

    name: str
    plan: Plan
    bill: Bill
    upper: RGB  # head, back and rump before any mark
    under: RGB  # throat to undertail before any mark
    wing: RGB  # coverts
    flight: RGB  # flight feathers
    tail: RGB
    leg: RGB
    eye: RGB = (28, 20, 16)
    marks: tuple[Mark, ...] = ()
    poses: tuple[str, ...] = ("perched", "flying")
    haunts: tuple[str, ...] = ("branch", "sky")  # rows of `backdrops.BACKDROPS`
