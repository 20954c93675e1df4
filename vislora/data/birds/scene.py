"""One occasion to see a bird: pose, place, light, framing and the individual, drawn by `sample_scene`."""

from dataclasses import dataclass, field

import numpy as np

from .species import Species

# Where each pose can be seen; the words are the rows of `backdrops.BACKDROPS`.
SETTINGS = {
    "perched": ("branch", "reeds", "snow", "feeder", "rock", "wire", "flowers"),
    "standing": ("meadow", "water", "rock", "snow", "feeder"),
    "clinging": ("trunk",),
    "swimming": ("water", "reeds"),
    "flying": ("sky", "water", "meadow", "branch", "snow"),
    "hovering": ("flowers", "feeder", "sky"),
}
LIGHTS = ("sun", "overcast", "dusk", "backlight")


@dataclass(frozen=True)
class Individual:
    """How one bird departs from its species: factors around 1, shifts around 0."""

    hue: float = 0.0  # turns
    saturation: float = 1.0
    brightness: float = 1.0
    dullness: float = 0.0  # 0 full plumage, 1 as drab as a young bird
    plumpness: float = 1.0
    head: float = 1.0
    bill: float = 1.0
    tail: float = 1.0
    neck: float = 1.0
    mark: float = 1.0  # extent of the field marks


@dataclass(frozen=True)
class Scene:
    """Everything about a picture except the species, the drawing style and the size in pixels."""

    pose: str = "perched"
    facing: str = "right"
    backdrop: str = "branch"
    light: str = "sun"
    temperature: float = 0.0  # -1 blue to 1 orange
    green: float = 0.0  # -1 magenta to 1 green, as under leaves
    exposure: float = 1.0
    contrast: float = 1.0
    sun: float = 125.0  # degrees, where the light comes from; 90 is above
    modelling: float = 1.0  # how strongly light and shade shape the body
    dapple: float = 0.0  # 0-1, spots of sun and shade as under a tree
    haze: float = 0.0  # 0-1
    blur: float = 0.0  # radius as a share of the picture's side
    motion: float = 0.0  # streak length as a share of the picture's side
    scale: float = 0.8  # the bird's longer extent as a share of the picture's side
    x: float = 0.5
    y: float = 0.5
    tilt: float = 0.0  # degrees
    head_tilt: float = 0.0  # degrees, negative pecks
    looking_back: bool = False
    beat: float = 0.8  # wings of a flying bird, -1 down to 1 up
    clutter: float = 0.3  # 0 bare, 1 crowded
    cover: float = 0.0  # 0-1, leaves or stems in front of the bird
    noise: float = 0.0  # standard deviation, 0-255
    compression: float = 0.0  # 0 none, 1 heavy block artefacts
    seed: int = 0  # of all detail that the numbers above leave open
    individual: Individual = field(default_factory=Individual)

    def __post_init__(self) -> None:
        _check("pose", self.pose, tuple(SETTINGS))
        _check(f"backdrop of a {self.pose} bird", self.backdrop, SETTINGS[self.pose])
        _check("light", self.light, LIGHTS)
        _check("facing", self.facing, ("left", "right"))


def sample_scene(species: Species, rng: np.random.Generator, difficulty: float) -> Scene:
    """Draw an occasion to see `species`.

    Args:
        difficulty: 0 is a field guide's plate, a clean view in good light; 1 is the field as it comes.

    Raises:
        ValueError: `difficulty` lies outside 0-1.
    """
    if not 0.0 <= difficulty <= 1.0:
        raise ValueError(f"difficulty is {difficulty}, expected 0 (clean plate) to 1 (hard field conditions)")
    d = float(difficulty)
    # Every draw happens whatever the difficulty, so one seed keeps its composition as the difficulty grows.
    u = rng.random(40).tolist()
    n = np.clip(rng.standard_normal(24), -2.5, 2.5).tolist()
    seed = int(rng.integers(2**31))
    pose = species.poses[_pick_pose(species, u[0], u[1])]
    places = [place for place in species.haunts if place in SETTINGS[pose]]
    if not places or u[2] < 0.35 * d:
        places = list(SETTINGS[pose])
    place = places[int(u[8] * len(places))]
    light = LIGHTS[0] if u[3] > 0.7 * d else LIGHTS[1 + int(u[4] * 3)]
    dusk, overcast, backlight = (light == name for name in ("dusk", "overcast", "backlight"))
    far = max(0.0, u[5] - 0.35) / 0.65 * d  # some hard pictures are of small, distant birds
    scale = (0.84 - 0.1 * u[6] * d) * (1.0 - 0.52 * far)
    room = 0.04 + 0.5 * (1.0 - scale) * d + 0.1 * d  # large birds may run out of the frame a little
    facing = "left" if u[7] < 0.5 else "right"
    # A flower needs room in front of the bill.
    ahead = 0.09 * (pose == "hovering") * (1 if facing == "left" else -1)
    return Scene(
        pose=pose,
        facing=facing,
        backdrop=place,
        light=light,
        temperature=float(np.clip(0.4 * d * n[0] + (0.6 * dusk - 0.15 * overcast) * (0.4 + 0.6 * d), -1, 1)),
        green=float(np.clip(0.35 * d * n[1], -0.8, 0.8)),
        exposure=float(np.exp(0.13 * d * n[2])) * (1.0 - (0.42 * dusk + 0.3 * backlight) * (0.35 + 0.65 * d)),
        contrast=float(np.exp(0.14 * d * n[3])) * (1.0 - 0.12 * overcast),
        sun=125.0 - 70.0 * u[9] * (0.4 + 0.6 * d),
        modelling=(0.35 if overcast else 1.0) * (0.8 + 0.5 * u[10] * d),
        dapple=d * max(0.0, u[25] - 0.4) * (place in ("branch", "trunk", "feeder", "flowers")),
        haze=0.45 * d * u[11] ** 2,
        blur=0.014 * d * u[12] ** 2,
        motion=0.05 * d * max(0.0, u[13] - 0.75) * 4 * (1.0 if pose in ("flying", "hovering") else 0.4),
        scale=scale * (0.86 if pose == "hovering" else 1.0),
        x=0.5 + ahead + room * (u[14] - 0.5),
        y=0.5 + room * (u[15] - 0.5),
        tilt=(3.0 + 9.0 * d) * n[4] * 0.6,
        head_tilt=(4.0 + 10.0 * d) * n[5] - (25.0 * (u[16] < 0.15 * d)),
        looking_back=bool(u[17] < 0.2 * d) and pose in ("perched", "standing", "swimming") and species.plan.neck < 0.6,
        beat=(1.0 if u[18] < 0.65 else -1.0) * (0.3 + 0.7 * u[19]),
        clutter=0.15 + 0.85 * d * u[20],
        cover=d * max(0.0, u[21] - 0.35) / 0.65,
        noise=9.0 * d * u[22] ** 2,
        compression=d * max(0.0, u[23] - 0.4) / 0.6,
        seed=seed,
        individual=_individual(n[6:], u[24], 0.25 + 0.75 * d, d),
    )


def caption(species: Species, scene: Scene) -> str:
    """One phrase that says what the picture shows, e.g. "a northern cardinal on a branch, facing left"."""
    article = "an" if species.name[0].lower() in "aeiou" else "a"
    words = f"{article} {species.name}{_WHERE[scene.pose, scene.backdrop]}, facing {scene.facing}"
    return words + {"dusk": ", at dusk", "overcast": ", on a dull day", "backlight": ", against the light"}.get(
        scene.light, ""
    )


def _check(what: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{what} is {found!r}, expected one of {', '.join(expected)}")


def _pick_pose(species: Species, first: float, second: float) -> int:
    """Index of a pose; flight is less often seen well than its share of the list."""
    index = int(first * len(species.poses))
    if species.poses[index] == "flying" and second < 0.4:
        index = 0
    return index


def _individual(n: list[float], young: float, amount: float, d: float) -> Individual:
    return Individual(
        hue=0.008 * amount * n[0],
        saturation=1.0 + 0.1 * amount * n[1],
        brightness=1.0 + 0.06 * amount * n[2],
        dullness=float(np.clip(d * (max(0.0, young - 0.6) * 1.6 + 0.05 * n[3]), 0.0, 0.6)),
        plumpness=1.0 + 0.06 * amount * n[4],
        head=1.0 + 0.04 * amount * n[5],
        bill=1.0 + 0.07 * amount * n[6],
        tail=1.0 + 0.06 * amount * n[7],
        neck=1.0 + 0.06 * amount * n[8],
        mark=1.0 + 0.08 * amount * n[9],
    )


_PLACES = {
    "branch": " on a branch",
    "reeds": " in the reeds",
    "snow": " in the snow",
    "feeder": " at a feeder",
    "rock": " on a rock",
    "wire": " on a wire",
    "flowers": " by a flower",
    "meadow": " in the grass",
    "water": " in shallow water",
    "trunk": " clinging to a trunk",
    "sky": " in the sky",
}
_FLIGHT = {
    "sky": " in the sky",
    "water": " over water",
    "meadow": " over a meadow",
    "branch": " among trees",
    "snow": " over snow",
}
_WHERE = {(pose, place): _PLACES[place] for pose, places in SETTINGS.items() for place in places}
_WHERE |= {("flying", place): " flying" + words for place, words in _FLIGHT.items()}
_WHERE |= {("hovering", place): " hovering" + _PLACES[place] for place in SETTINGS["hovering"]}
_WHERE |= {("swimming", "water"): " swimming", ("swimming", "reeds"): " swimming by the reeds"}
