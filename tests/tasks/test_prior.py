"""Pictures of the class are drawn once for each pipeline and prompt."""

from pathlib import Path

import pytest
import tiny_diffusion as tiny
import torch
from diffusers import DDIMScheduler
from PIL import Image

import vislora.tasks.prior
from vislora.config.data import CaptionsData, PriorConfig
from vislora.data.captions import Captioned, CaptionedSplits
from vislora.tasks.prior import with_prior


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many pictures were drawn together, each time."""
    counts: list[int] = []

    def draw(pipe, jobs, *rest):
        counts.append(len(jobs))
        return [Image.new("RGB", (16, 16), (seed % 256, 0, 0)) for _, seed in jobs]

    monkeypatch.setattr(vislora.tasks.prior, "draw", draw)
    return counts


def learned(pipe, count: int, size: int = 16, **prior) -> tuple[CaptionedSplits, list[float], list[int]]:
    """One picture of the subject, and `count` of the class."""
    data = CaptionsData(root="unused", size=size, prior=PriorConfig(prompt="a bird", count=count, **prior))
    subject = CaptionedSplits(Captioned(["sks bird"], ["x"], [Image.new("RGB", (16, 16))]))
    return with_prior(pipe, subject, data, torch.device("cpu"))


def first_of_the_class(pipe) -> str:
    return learned(pipe, 1)[0].train.names[1]


def test_missing_pictures_are_drawn_several_at_once(tmp_path, drawn):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    names = learned(pipe, 11)[0].train.names[1:]
    assert drawn == [8, 3]
    for name in (names[2], names[9]):
        Path(name).unlink()
    learned(pipe, 11)
    assert drawn == [8, 3, 2]


def test_another_scheduler_draws_other_pictures(tmp_path, drawn):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    first = first_of_the_class(pipe)
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    pipe.scheduler = DDIMScheduler(**settings)  # which notes that none of them is a default
    assert first_of_the_class(pipe) == first
    pipe.scheduler = DDIMScheduler(**settings | {"prediction_type": "v_prediction"})
    assert first_of_the_class(pipe) != first
    assert drawn == [1, 1]


def test_another_tokenizer_draws_other_pictures(tmp_path, drawn):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    first = first_of_the_class(pipe)
    pipe.tokenizer.pad_token = "a</w>"
    assert first_of_the_class(pipe) != first
    assert drawn == [1, 1]


def test_another_size_draws_other_pictures(tmp_path, drawn):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    assert learned(pipe, 1, size=32)[0].train.names[1] != first_of_the_class(pipe)
    assert drawn == [1, 1]


def test_pictures_of_the_class_are_of_noise_of_their_own_and_weigh_as_much_as_is_set(tmp_path, drawn):
    splits, weights, _ = learned(tiny.stable_diffusion(tmp_path / "words"), 3, weight=0.5)
    colours = [splits.train.pictures[i].getpixel((0, 0)) for i in range(4)]
    assert colours == [(0, 0, 0), *(Image.open(name).getpixel((0, 0)) for name in splits.train.names[1:])]
    assert len(set(colours)) == 4
    assert weights == [1.0, 0.5, 0.5, 0.5]


def test_the_subject_is_shown_as_often_as_a_larger_class(tmp_path, drawn):
    _, weights, shown = learned(tiny.stable_diffusion(tmp_path / "words"), 3)
    assert shown == [0, 0, 0, 1, 2, 3]
    assert weights == [1, 1, 1, 1]
