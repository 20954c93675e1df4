"""The drawn birds: the same picture for the same seed, true field marks, every style, and species kept apart."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageOps

from vislora.data.birds import (
    SPECIES,
    STYLES,
    Scene,
    caption,
    draw,
    invented,
    picture,
    sample_scene,
    seeded_scene,
    silhouette,
)
from vislora.data.birds.invented import CLEARANCE, distance
from vislora.data.birds.marks import MARKS
from vislora.data.birds.scene import SETTINGS
from vislora.data.birds.species import Mark

CARDINAL = SPECIES["northern cardinal"]


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def foreground(species, scene, size=96) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the bird [N, 3] and their places [N, 2] as (x, y) shares of the picture."""
    inside = pixels(silhouette(species, scene, size)) > 250
    y, x = np.nonzero(inside)
    return pixels(draw(species, scene, "natural", size))[inside], np.stack([x, y], axis=1) / size


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("style", STYLES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(style):
    first = picture(CARDINAL, 5, 0.7, style, 48).tobytes()
    assert picture(CARDINAL, 5, 0.7, style, 48).tobytes() == first
    assert picture(CARDINAL, 6, 0.7, style, 48).tobytes() != first


def test_another_process_with_another_hash_seed_draws_the_same_picture():
    program = (
        "from zlib import crc32; from vislora.data.birds import SPECIES, picture;"
        "print(crc32(picture(SPECIES['mallard'], 3, 0.8, 'natural', 40).tobytes()))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] != ""


def test_no_global_random_state_is_read_or_moved():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = [picture(CARDINAL, 1, 1.0, style, 32).tobytes() for style in STYLES]
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(1)
    assert [picture(CARDINAL, 1, 1.0, style, 32).tobytes() for style in STYLES] == first


@pytest.mark.parametrize("pose", ["perched", "flying"])
def test_facing_mirrors_the_bird(pose):
    scene = Scene(pose=pose, backdrop="branch", facing="right", tilt=4.0)
    right = pixels(silhouette(CARDINAL, scene, 96))
    left = pixels(ImageOps.mirror(silhouette(CARDINAL, replace(scene, facing="left"), 96)))
    assert np.abs(right - left).mean() < 0.02 * right.mean()
    assert np.abs(right - right[:, ::-1]).mean() > 0.2 * right.mean()


def test_a_cardinal_is_red_with_a_black_face():
    colours, places = foreground(CARDINAL, Scene())
    red, green, blue = colours.mean(axis=0)
    assert red > 2.0 * max(green, blue)
    dark = colours.max(axis=1) < 70
    assert dark.sum() > 10
    assert places[dark][:, 0].mean() > places[:, 0].mean(), "the black lies at the bill, on the side it faces"


def test_a_drake_mallard_has_a_green_head_and_no_green_body():
    scene = Scene(pose="swimming", backdrop="water", facing="left")
    colours, places = foreground(SPECIES["mallard"], scene)
    green = (colours[:, 1] > 1.3 * colours[:, 0]) & (colours[:, 1] > 1.15 * colours[:, 2])
    assert green.sum() > 60
    low, high = places[:, 0].min(), places[:, 0].max()
    assert np.mean(places[green][:, 0] < low + 0.4 * (high - low)) > 0.95


def test_a_robin_is_orange_below_and_grey_above():
    colours, places = foreground(SPECIES["american robin"], Scene(pose="standing", backdrop="meadow"))
    orange = (colours[:, 0] > 1.7 * colours[:, 1]) & (colours[:, 0] > 110)
    grey = colours.max(axis=1) - colours.min(axis=1) < 20
    assert orange.mean() > 0.12
    assert grey.mean() > 0.25
    assert places[orange][:, 0].mean() > places[grey][:, 0].mean(), "the breast is in front of the back"


@pytest.mark.parametrize("kind", sorted(MARKS))
def test_every_mark_is_seen(kind):
    scene = Scene()
    plain = replace(CARDINAL, marks=())
    marked = replace(CARDINAL, marks=(Mark(kind, (20, 90, 250), 1.0, 4),))
    changed = np.abs(pixels(draw(plain, scene)) - pixels(draw(marked, scene))).max(axis=2) > 30
    assert changed.sum() >= 3


def test_a_misspelt_mark_is_refused_with_the_words_there_are():
    with pytest.raises(ValueError, match=r"northern cardinal.*'capp'.*cap"):
        draw(replace(CARDINAL, marks=(Mark("capp", (0, 0, 0)),)), Scene())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [32, 96])
def test_every_species_draws_in_every_pose(style, size):
    for species in SPECIES.values():
        for pose in dict.fromkeys(species.poses):
            place = next((place for place in species.haunts if place in SETTINGS[pose]), SETTINGS[pose][0])
            image = draw(species, Scene(pose=pose, backdrop=place), style, size)
            assert image.size == (size, size)
            assert image.mode == "RGB"
            assert pixels(image).std() > 8, (species.name, pose)


def test_every_pose_draws_in_every_place_and_light():
    for pose, places in SETTINGS.items():
        for place in places:
            for light in ("sun", "backlight"):
                scene = Scene(pose=pose, backdrop=place, light=light, cover=0.8, clutter=1.0)
                assert pixels(draw(CARDINAL, scene, size=32)).std() > 8, (pose, place, light)


def test_styles_differ_from_each_other():
    scene = seeded_scene(CARDINAL, 4, 0.2)
    images = [pixels(draw(CARDINAL, scene, style, 64)) for style in STYLES]
    for i, first in enumerate(images):
        for second in images[i + 1 :]:
            assert np.abs(first - second).mean() > 4


def test_pixel_art_is_made_of_whole_cells():
    image = pixels(picture(CARDINAL, 2, 0.3, "pixel", 64))
    assert (image[::2, ::2] == image[1::2, 1::2]).all()


def test_difficulty_hides_the_bird():
    def visibility(difficulty: float) -> float:
        """How far the bird's colours lie from its surroundings', times the share of the picture it fills."""
        total = 0.0
        for seed in range(40):
            species = list(SPECIES.values())[seed % len(SPECIES)]
            scene = seeded_scene(species, seed, difficulty)
            inside = pixels(silhouette(species, scene, 48)) > 127
            image = pixels(draw(species, scene, "natural", 48))
            total += np.abs(image[inside].mean(axis=0) - image[~inside].mean(axis=0)).mean() * inside.mean()
        return total

    easy, middle, hard = (visibility(difficulty) for difficulty in (0.0, 0.5, 1.0))
    assert easy > middle > hard
    assert hard < 0.7 * easy


def test_a_picture_stays_itself_at_every_size():
    small, large = pixels(picture(CARDINAL, 8, 0.2, "natural", 64)), picture(CARDINAL, 8, 0.2, "natural", 256)
    assert np.abs(small - pixels(large.reduce(4))).mean() < 8


def test_invented_species_keep_clear_of_the_named():
    birds = [invented(index) for index in range(150)]
    assert min(distance(bird, named) for bird in birds for named in SPECIES.values()) >= CLEARANCE
    assert birds[7].name == "invented 0007"
    assert invented(7) == birds[7]
    assert len({replace(bird, name="") for bird in birds}) == len(birds)
    assert not {bird.name for bird in birds} & set(SPECIES)


def test_invented_species_vary_in_plan_and_draw():
    birds = [invented(index) for index in range(40)]
    assert len({bird.bill.shape for bird in birds}) >= 6
    assert len({pose for bird in birds for pose in bird.poses}) == len(SETTINGS)
    for index, bird in enumerate(birds):
        assert pixels(picture(bird, index, 0.5, "natural", 32)).std() > 4


def test_confusable_species_differ_where_a_birder_looks():
    downy, hairy = SPECIES["downy woodpecker"], SPECIES["hairy woodpecker"]
    assert downy.bill.length < 0.6 * hairy.bill.length
    house, purple = ({mark.kind for mark in SPECIES[name].marks} for name in ("house finch", "purple finch"))
    assert "streaks" in house - purple


def test_captions_say_what_is_seen():
    assert caption(CARDINAL, Scene(facing="left")) == "a northern cardinal on a branch, facing left"
    goldfinch = SPECIES["american goldfinch"]
    flying = Scene(pose="flying", backdrop="sky", light="dusk")
    assert caption(goldfinch, flying) == "an american goldfinch flying in the sky, facing right, at dusk"


def test_every_sampled_scene_has_a_caption_and_suits_its_species():
    for species in (*SPECIES.values(), invented(3)):
        for seed in range(20):
            scene = sample_scene(species, generator(seed), 1.0)
            assert scene.pose in species.poses
            assert scene.backdrop in SETTINGS[scene.pose]
            assert species.name in caption(species, scene)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw(CARDINAL, Scene(), "oil"), "style is 'oil', expected one of natural, flat"),
        (lambda: draw(CARDINAL, Scene(), size=16), "size is 16 pixels, expected 32 to 512"),
        (lambda: sample_scene(CARDINAL, generator(0), 1.5), "difficulty is 1.5"),
        (lambda: Scene(pose="perched", backdrop="sky"), "backdrop of a perched bird is 'sky', expected one of branch"),
        (lambda: invented(-1), "numbered from 0"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
