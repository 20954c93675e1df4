"""A training from cached features takes the path of the one that computes everything in every step."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vislora.checkpoint import Checkpoint
from vislora.compose import configure
from vislora.errors import ConfigError
from vislora.models.prefix import Prefix
from vislora.paths import cache_dir
from vislora.train import train
from vislora.trainer import Trainer

WORDS = [
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "model.weights=random",
    "model.img_size=32",
    "+model.args={patch_size:8,depth:4,embed_dim:48,num_heads:3}",
    "adapter.blocks=[-2,-1]",
    "adapter.dropout=0.1",
    "optim.lr=5e-3",
    "data=imagefolder",
    "trainer.epochs=4",
    "trainer.batch_size=10",
    "trainer.precision=fp32",
    "trainer.progress=false",
    "logger.trackers=[]",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Noisy pictures of two colours in class folders; 22 to train on, so that no batch size divides them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in {"train": 11, "val": 3, "test": 4}.items():
        for k, name in enumerate(("red", "green")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(90, 50, (40, 50, 3))
                pixels[:, :25, k] += 60
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def run(photos: Path, out: Path, *words: str) -> Path:
    train(configure("train", [*WORDS, f"data.root={photos}", *words]), out)
    return out


def curve(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in rows]


def exported(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(one: dict, other: dict, atol: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(t, other[k], rtol=0, atol=atol) for k, t in one.items())


@pytest.fixture(scope="module")
def uncached(photos, tmp_path_factory) -> Path:
    return run(photos, tmp_path_factory.mktemp("uncached"))


@pytest.mark.filterwarnings("ignore:this CPU has no native bf16")
def test_features_are_computed_as_a_step_in_bf16_computes_them(photos, tmp_path):
    words = ["trainer.precision=bf16", "trainer.epochs=1"]
    plain = run(photos, tmp_path / "plain", *words)
    cached = run(photos, tmp_path / "cached", *words, "trainer.prefix_cache=memory")
    for mine, theirs in zip(curve(cached), curve(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_losses_validation_and_adapter_are_those_of_the_uncached_run(photos, uncached, tmp_path, where, capsys):
    out = run(photos, tmp_path, f"trainer.prefix_cache={where}")
    assert "prefix cache: 2 of 4 blocks are computed once" in capsys.readouterr().out
    for mine, theirs in zip(curve(out), curve(uncached), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert same(exported(out), exported(uncached))
    mine, theirs = (
        json.loads((o / "evaluation" / "evaluation.json").read_text())["per_class"] for o in (out, uncached)
    )
    assert mine == theirs


def test_frozen_blocks_see_each_picture_once_per_variant(photos, tmp_path, monkeypatch):
    seen = []
    whole = Prefix.features
    monkeypatch.setattr(Prefix, "features", lambda self, images: (seen.append(len(images)), whole(self, images))[1])
    run(photos, tmp_path, "trainer.prefix_cache=memory")
    assert sum(seen) == 2 + 2 * 22 + 6  # the proof, training as it is and mirrored, validation


def test_a_later_run_finds_the_features_on_disk(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))
    first = run(photos, tmp_path / "first", "trainer.prefix_cache=disk")
    files = {path: path.stat().st_mtime_ns for path in (cache_dir() / "prefix").iterdir()}
    assert len(files) == 2
    second = run(photos, tmp_path / "second", "trainer.prefix_cache=disk", "trainer.batch_size=7", "adapter.rank=2")
    assert {path: path.stat().st_mtime_ns for path in (cache_dir() / "prefix").iterdir()} == files
    assert curve(first)[0] != curve(second)[0]


@pytest.mark.filterwarnings("ignore:this CPU has no native bf16")
def test_features_of_another_model_or_precision_are_computed_anew(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))
    # neither changes a weight
    for number, words in enumerate(([], ["trainer.precision=bf16"], ["+model.args.act_layer=relu"]), 1):
        run(photos, tmp_path / str(number), "trainer.prefix_cache=disk", "trainer.epochs=1", *words)
        assert len([*(cache_dir() / "prefix").iterdir()]) == 2 * number


def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_had_not(photos, uncached, tmp_path, monkeypatch):
    words = ["trainer.prefix_cache=memory", "trainer.checkpoint_every=2"]
    step = Trainer._step

    def dies(self, *given):
        if len(dies.steps) == 5:  # two into the second epoch of three steps
            raise KeyboardInterrupt
        dies.steps.append(given)
        return step(self, *given)

    dies.steps = []
    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "stopped", *words)
    monkeypatch.setattr(Trainer, "_step", step)
    assert Checkpoint.open(tmp_path / "stopped").folder.name == "step_00000004"
    out = run(photos, tmp_path / "resumed", *words, f"trainer.resume={tmp_path / 'stopped'}")
    assert same(exported(out), exported(uncached))
    with pytest.raises(ConfigError, match=r"trainer\.prefix_cache was 'memory' and is now 'off'"):
        run(photos, tmp_path / "other", f"trainer.resume={tmp_path / 'stopped'}")


def test_a_probe_is_trained_from_features_too(photos, tmp_path):
    words = [word for word in WORDS if not word.startswith("adapter.")]
    weights = []
    for where in ("off", "disk"):
        result = train(
            configure("train", [*words, f"data.root={photos}", "adapter=probe", f"trainer.prefix_cache={where}"]),
            tmp_path / where,
        )
        weights.append(load_file(result.artifact / "model.safetensors"))
    assert same(*weights)


def test_frozen_batchnorm_is_computed_once_with_the_statistics_it_was_frozen_with(photos, tmp_path):
    kept = [word for word in WORDS if not word.startswith(("model.name", "+model.args"))]
    words = [*kept, "model.name=xcit_nano_12_p16_224", "+model.args={depth:3,embed_dim:48}", "trainer.epochs=2"]
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    for out, where in ((plain, "off"), (cached, "memory")):
        train(configure("train", [*words, f"data.root={photos}", f"trainer.prefix_cache={where}"]), out)
    for mine, theirs in zip(curve(cached), curve(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert same(exported(cached), exported(plain))


def test_what_cannot_be_cached_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"set data\.augment\.crop_scale=1 \(hflip may stay\)"):
        run(photos, tmp_path, "trainer.prefix_cache=memory", "data.augment.crop_scale=0.7")
    with pytest.raises(ConfigError, match="the first block is trained"):
        run(photos, tmp_path, "trainer.prefix_cache=memory", "adapter.blocks=null")
    with pytest.raises(ConfigError, match=r"blocks\.1\.drop_path1 \(DropPath\) draws random numbers"):
        run(photos, tmp_path, "trainer.prefix_cache=memory", "model.drop_path=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_two_processes_follow_the_uncached_run(photos, two_processes, tmp_path, where):
    words = [*two_processes, "-m", "vislora.train", *WORDS, f"data.root={photos}", "adapter.dropout=0"]
    words += [f"trainer.prefix_cache={where}"]
    for name, extra in {"cached": [], "plain": ["trainer.prefix_cache=off"]}.items():
        done = subprocess.run([*words, *extra, f"hydra.run.dir={tmp_path / name}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert same(exported(tmp_path / "cached"), exported(tmp_path / "plain"), 1e-5)
