"""Settings of a diffusion run reach what they are for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
from accelerate import Accelerator
from PIL import Image

import vislora.data.splits
from vislora.compose import configure
from vislora.config.training import Precision
from vislora.data.buckets import bucket_sizes, nearest
from vislora.errors import ConfigError
from vislora.tasks.diffusion import prepare
from vislora.tasks.task import FILES, PICTURES, Task

SIZES = ((64, 128), (48, 96), (96, 96))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three captioned pictures, their left half black."""
    root = tmp_path_factory.mktemp("photos")
    for i, (width, height) in enumerate(SIZES):
        pixels = np.full((height, width, 3), 255, dtype=np.uint8)
        pixels[:, : width // 2] = 0
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


def prepared(base: Path, photos: Path, *words: str) -> Task:
    common = ["objective=diffusion", "model=diffusers", f"model.name={base}", "adapter=unet_lora", "adapter.rank=2"]
    common += ["data=captions", f"data.root={photos}", "trainer.batch_size=16"]
    config = configure("train", [*common, *words])
    return prepare(config, Precision.fp32, Accelerator(cpu=True), Path("unused"))


def epoch(task: Task) -> dict:
    """The one batch of an epoch."""
    (batch,) = task.batches(0, 1)
    return batch


def test_the_objective_is_the_one_that_is_set(base, photos):
    words = ["objective.min_snr_gamma=3", "objective.noise_offset=0.2", "objective.caption_dropout=0.7"]
    words.append("objective.timestep_shift=2")
    objective = prepared(base, photos, "data.size=64", *words).objective
    assert (objective.min_snr_gamma, objective.noise_offset, objective.caption_dropout) == (3, 0.2, 0.7)
    assert objective.timestep_shift == 2


@pytest.mark.parametrize("hflip", [0, 1])
def test_pictures_are_mirrored_as_often_as_is_set(base, photos, hflip):
    images = epoch(prepared(base, photos, "data.size=64", "data.cache=false", f"data.hflip={hflip}"))["images"]
    left, right = images[..., :16].mean((1, 2, 3)), images[..., -16:].mean((1, 2, 3))
    assert ((left > right) == bool(hflip)).all()


def test_each_picture_is_shown_as_often_as_is_set(base, photos):
    times = epoch(prepared(base, photos, "data.size=64", "data.repeats=4"))["text"]["time_ids"]
    shown = [tuple(row[:2].int().tolist()) for row in times]
    assert {size: shown.count(size) for size in shown} == {(height, width): 4 for width, height in SIZES}


def test_buckets_show_each_picture_as_often_as_is_set_too(base, photos):
    words = ["data.size=192", "data.buckets=true", "data.repeats=3", "trainer.batch_size=2"]
    task = prepared(base, photos, *words)
    shown = []
    for batch in task.batches(0, task.order.steps_per_epoch):
        shown += [tuple(row[:2].int().tolist()) for row in batch["text"]["time_ids"]]
    assert sorted(shown) == sorted([(height, width) for width, height in SIZES] * 3)


def test_each_picture_to_validate_on_comes_once_with_noise_of_its_own(base, photos):
    task = prepared(base, photos, "data.size=64", "data.val_fraction=0.67")
    batches = list(task.validation)
    sizes = {tuple(row[:2].int().tolist()) for batch in batches for row in batch["text"]["time_ids"]}
    seeds = {seed for batch in batches for seed in batch["seed"].tolist()}
    assert len(sizes) == len(seeds) == sum(len(batch["seed"]) for batch in batches) == 2


def test_the_contents_of_a_run_are_its_captions_too(base, photos, tmp_path):
    others = shutil.copytree(photos, tmp_path / "others")
    before = prepared(base, others, "data.size=64").contents
    (others / "1.txt").write_text("another picture")
    after = prepared(base, others, "data.size=64").contents
    assert [of for of in before if after[of] != before[of]] == [FILES]
    Image.new("RGB", SIZES[2], "red").save(others / "2.png")
    assert [of for of in before if prepared(base, others, "data.size=64").contents[of] != after[of]] == [PICTURES]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("vae/config.json", "scaling_factor", 0.9),
    ],
)
def test_the_contents_of_a_run_are_the_pipelines_configs_too(base, photos, tmp_path, file, key, value):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    before = prepared(base, photos, "data.size=64").contents
    assert prepared(other, photos, "data.size=64").contents == before
    config = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(config | {key: value}))
    after = prepared(other, photos, "data.size=64").contents
    assert [of for of in before if after[of] != before[of]] == ["configs of the pipeline"]


def test_pictures_of_the_class_weigh_what_is_set(base, photos, tmp_path):
    of_class = shutil.copytree(photos, tmp_path / "class")
    words = ["data.prior.prompt=a", f"data.prior.images={of_class}", "data.prior.weight=0.25"]
    assert sorted(epoch(prepared(base, photos, "data.size=64", *words))["weight"].tolist()) == [0.25] * 3 + [1.0] * 3


def test_a_file_is_opened_once_to_be_encoded_and_never_for_its_size(base, photos, monkeypatch):
    opened = []
    read = vislora.data.splits.read_image
    monkeypatch.setattr(
        vislora.data.splits, "read_image", lambda path, *place: opened.append(path) or read(path, *place)
    )
    task = prepared(base, photos, "data.size=192", "data.buckets=true")
    assert sorted(opened) == sorted(photos.glob("*.png"))
    sizes = {tuple(row[4:].tolist()) for batch in task.batches(0, 3) for row in batch["text"]["time_ids"]}
    assert sizes == {nearest(size, bucket_sizes(192))[::-1] for size in SIZES}


def test_weighting_that_a_flow_does_not_have_is_refused_before_weights_are_looked_for(photos, tmp_path):
    tiny.flux(tmp_path / "words").save_pretrained(tmp_path / "pipe")
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ConfigError, match=r"flow matching: set objective\.min_snr_gamma=null"):
        prepared(tmp_path / "pipe", photos, "data.size=64")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1000, r"=1000: DDIMScheduler, of 1000 times, can't draw so: index 1000 is out of bounds"),  # with its offset
        (1001, r"=1001: DDIMScheduler, of 1000 times, can't draw so: .*1001 cannot be larger than"),
    ],
)
def test_steps_of_a_preview_that_the_scheduler_hasnt_are_refused_before_the_training(base, photos, steps, message):
    words = ["data.size=64", f"objective.preview_steps={steps}"]
    with pytest.raises(ConfigError, match=rf"^objective\.preview_steps{message}"):
        prepared(base, photos, *words)
    prepared(base, photos, *words, "objective.before_after=0", "trainer.preview_every=null")  # where nothing is drawn


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.repeats=0", "data.repeats=0: expected 1 or more"),
        ("data.prior.count=0", "data.prior.count=0: expected 1 or more"),
        ("data.prior.weight=-1", "data.prior.weight=-1.0: expected 0 or more"),
        ("data.prior.images=there", r"data\.prior\.images needs data\.prior\.prompt"),
        ("data.prior.weight=0.5", r"data\.prior\.weight needs data\.prior\.prompt"),
        ("data.prior={prompt: a, images: b, count: 7}", r"count=7 is how many to draw, and data\.prior\.images gives"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_loaded(word, message):
    words = ["objective=diffusion", "model=diffusers", "adapter=unet_lora", "data=captions"]
    with pytest.raises(ConfigError, match=message):
        configure("train", [*words, "model.name=nowhere", "data.root=nowhere", word])
