"""Training a pipeline's adapter as a user does, from captioned pictures to a file that diffusers opens."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import vislora.tasks.diffusion
from vislora.checkpoint import save_checkpoint
from vislora.compose import configure
from vislora.config.model import PipelineConfig
from vislora.data.buckets import bucket_sizes
from vislora.data.prompts import noise_seed
from vislora.errors import AdapterError, ConfigError, DataError, ModelError
from vislora.export import export
from vislora.formats.detect import read_adapter
from vislora.formats.kohya import write_kohya
from vislora.models.diffusion import load_pipeline
from vislora.objectives.diffusion import Diffusion
from vislora.train import train

BASE = ["objective=diffusion", "model=diffusers", "adapter=unet_lora", "adapter.rank=2", "logger.trackers=[]"]
RUN = [
    "objective.preview_steps=1",
    "trainer.batch_size=3",
    "trainer.epochs=2",
    "trainer.precision=fp32",
    "trainer.progress=false",
    "optim.lr=1e-2",
]
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures of two proportions with captions beside them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(7):
        shape = (96, 64, 3) if i < 4 else (64, 64, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """The folder of a tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("sd")
    tiny.stable_diffusion(folder / "words").save_pretrained(folder / "pipe")
    return folder / "pipe"


def run(sd, photos, out, *words):
    config = configure("train", [*BASE, f"model.name={sd}", "data=captions", f"data.root={photos}", *RUN, *words])
    return train(config, out)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def losses(out):
    return [row["loss"] for row in rows(out) if "loss" in row]


def test_a_run_leaves_an_adapter_that_diffusers_draws_the_same_with(sd, photos, tmp_path):
    result = run(sd, photos, tmp_path, "data.val_fraction=0.3", "trainer.preview_every=2", "objective.preview_steps=2")
    assert result.artifact == tmp_path / "adapter"
    assert result.validation == min(row["val_loss"] for row in rows(tmp_path) if "val_loss" in row)
    assert {file.name for file in (tmp_path / "previews").iterdir()} == {"step_00000002.png", "step_00000004.png"}
    adapter = read_adapter(result.artifact)
    assert all(weights.lora_B.any() for weights in adapter.layers.values())
    assert adapter.about["model"]["name"] == str(sd)
    pytest.importorskip("peft")
    peer, mine = (StableDiffusionPipeline.from_pretrained(sd, safety_checker=None) for _ in range(2))
    base = tiny.draw(mine)
    peer.load_lora_weights(result.artifact)
    vislora.apply(mine, result.artifact)
    torch.testing.assert_close(tiny.draw(mine), tiny.draw(peer), rtol=0, atol=1 / 255)
    assert (tiny.draw(mine) - base).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("text", [pytest.param("false", id="unet"), pytest.param("true", id="unet and text")])
def test_a_trained_style_draws_the_same_in_diffusers_from_both_files(tmp_path, text):
    pytest.importorskip("peft")
    words = ["recipe=sketch_style", "data.count=8", "data.val_count=0", "trainer.batch_size=4", "trainer.epochs=4"]
    words += ["trainer.precision=fp32", "trainer.progress=false", "trainer.preview_every=null", "logger.trackers=[]"]
    words += ["adapter.rank=4", "adapter.alpha=6", "optim.lr=5e-3", f"adapter.text_encoder={text}"]
    trained = train(configure("train", words), tmp_path / "run").artifact
    kohya = f"out={tmp_path / 'style.safetensors'}"
    files = [trained, export(configure("export", [f"adapter={trained}", "to=kohya", kohya]))]
    mine, peer = (load_pipeline(PipelineConfig("embedded")) for _ in range(2))
    base = birds(mine)
    for file in files:
        peer.load_lora_weights(str(file), adapter_name="style")
        applied = vislora.apply(mine, file)
        for scale in (1.0, 0.5):
            applied.scale = scale
            peer.set_adapters("style", scale)
            drawn = birds(mine)
            torch.testing.assert_close(drawn, birds(peer), rtol=0, atol=1 / 255)
            assert ((drawn - base).abs().amax((1, 2, 3)) > 20 / 255).all()
        vislora.unapply(mine)
        peer.unload_lora_weights()
    assert torch.equal(birds(mine), base)


def birds(pipe):
    """Three prompts' pictures in [0, 1], [3, 64, 64, 3]."""
    prompts = ["a blue jay on a branch, facing left", "a mallard swimming, facing right", "a barn owl on a wire"]
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return torch.from_numpy(pipe(prompts, num_inference_steps=3, generator=noise, output_type="np").images)


@pytest.mark.slow
def test_the_report_shows_the_same_noise_before_and_after(sd, photos, tmp_path):
    words = ["objective.preview_steps=2", "objective.guidance=4.0", "objective.before_after=2", "adapter.dropout=0.9"]
    result = run(sd, photos, tmp_path, *words, "data.size=32")
    captions = json.loads((tmp_path / "before_after" / "captions.json").read_text())
    assert list(captions.values()) == ["picture 0", "picture 1"]
    pipe = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    for name, caption in captions.items():
        noise = torch.Generator().manual_seed(noise_seed(0, caption))
        settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}
        base = np.asarray(pipe(caption, generator=noise, **settings).images[0]).astype(int)
        applied = vislora.apply(pipe, result.artifact)
        noise = torch.Generator().manual_seed(noise_seed(0, caption))
        adapted = np.asarray(pipe(caption, generator=noise, **settings).images[0]).astype(int)
        vislora.unapply(pipe)
        assert applied.scale == 1
        # a batch rounds otherwise than one picture
        assert np.abs(base - pixels(tmp_path / "before_after" / f"{name}.before.png")).max() <= 1
        assert np.abs(adapted - pixels(tmp_path / "before_after" / f"{name}.after.png")).max() <= 1
        assert np.abs(adapted - base).max() > 1
    report = (tmp_path / "report.html").read_text()
    assert report.count('<input type="range"') == 2
    assert "What training moved" in report
    updates = json.loads((tmp_path / "updates.json").read_text())
    low = read_adapter(result.artifact).layers
    assert {u["layer"] for u in updates} == set(low)
    for update in updates:
        assert update["update"] == pytest.approx(tiny.delta(low[update["layer"]]).norm().item(), rel=1e-4)
    run(sd, photos, tmp_path / "without", "objective.before_after=0", "data.size=64", "trainer.preview_every=100")
    assert not (tmp_path / "without" / "before_after").exists()
    (preview,) = (tmp_path / "without" / "previews").iterdir()
    assert len(pixels(preview)) == 2 * (2 * 64 + 6 + 15) + 15 + 6  # two seeds at the learned size, enlarged; captions


def test_a_run_in_bfloat16_draws_previews_with_the_weights_as_they_were(sd, photos, tmp_path):
    words = ["trainer.precision=bf16", "trainer.preview_every=1", "trainer.stop_at=2", "objective.before_after=0"]
    run(sd, photos, tmp_path / "drawing", *words)  # in float32, and then goes on in bfloat16
    run(sd, photos, tmp_path / "not", *words, "trainer.preview_every=null")
    assert len([*(tmp_path / "drawing" / "previews").iterdir()]) == 2
    with_and_without = (read_adapter(tmp_path / name / "adapter") for name in ("drawing", "not"))
    assert next(with_and_without).equals(next(with_and_without))


@pytest.mark.parametrize("ema", [pytest.param("null", marks=pytest.mark.slow), "0.9"])
def test_a_run_cut_off_in_mid_epoch_resumes_to_the_same_bits(sd, photos, tmp_path, monkeypatch, ema):
    words = ["data.hflip=0.5", "objective.noise_offset=0.1", f"trainer.ema={ema}", "trainer.checkpoint_every=2"]
    straight = run(sd, photos, tmp_path / "straight", *words)

    def save_and_cut(folder, *rest):
        save_checkpoint(folder, *rest)
        if (folder / "step_00000004").is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vislora.trainer.save_checkpoint", save_and_cut)
        with pytest.raises(KeyboardInterrupt):
            run(sd, photos, tmp_path / "cut", *words)
    # what changes no step may differ
    other = ["objective.before_after=1", "objective.guidance=2", "model.gradient_checkpointing=true"]
    resumed = run(sd, photos, tmp_path / "resumed", *words, *other, f"trainer.resume={tmp_path / 'cut'}")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path, "no checkpoint there"), (tmp_path / "cut", r"data\.root was")):
        with pytest.raises(ConfigError, match=message):  # before the data is looked into, which is none
            run(sd, tmp_path / "empty", tmp_path / "other", f"trainer.resume={place}")
    assert read_adapter(resumed.artifact).equals(read_adapter(straight.artifact))


def test_what_is_validated_and_exported_are_the_averages_of_the_steps(sd, photos, tmp_path, monkeypatch):
    steps, validated, validate = [], [], Diffusion.validate

    def up_matrices(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("lora_B")}

    def save(folder, model, *rest):
        steps.append(up_matrices(model))
        save_checkpoint(folder, model, *rest)

    def noted(self, model, *rest):
        validated.append(up_matrices(model))
        return validate(self, model, *rest)

    monkeypatch.setattr("vislora.trainer.save_checkpoint", save)
    monkeypatch.setattr(Diffusion, "validate", noted)
    words = ["trainer.ema=0.5", "trainer.checkpoint_every=1", "trainer.keep=last", "data.val_fraction=0.3"]
    words += ["adapter.alpha=2", "data.size=16", "objective.before_after=0"]  # a scale of 1, which files hold in lora_B
    adapter = read_adapter(run(sd, photos, tmp_path, *words).artifact)
    averages = {name: torch.zeros_like(up) for name, up in steps[0].items()}  # as lora_B begins
    for number, step in enumerate(steps, 1):
        decay = min(0.5, (1 + number) / (10 + number))
        averages = {name: decay * averages[name] + (1 - decay) * up for name, up in step.items()}
    for name, average in averages.items():
        layer = adapter.layers[name.removesuffix(".lora.lora_B")]
        torch.testing.assert_close(layer.lora_B, average)
        torch.testing.assert_close(validated[-1][name], average)
        assert not torch.allclose(average, steps[-1][name], rtol=0.01)


def test_the_cache_changes_nothing_but_the_time(sd, photos, tmp_path):
    run(sd, photos, tmp_path / "with", "objective.caption_dropout=0.5")
    run(sd, photos, tmp_path / "without", "objective.caption_dropout=0.5", "data.cache=false")
    assert losses(tmp_path / "without") == pytest.approx(losses(tmp_path / "with"), rel=1e-3)


def test_a_training_goes_on_from_an_adapter_of_any_format(sd, photos, tmp_path):
    first = run(sd, photos, tmp_path / "first", "adapter.text_encoder=true", "trainer.epochs=1")
    trained = read_adapter(first.artifact)
    file = write_kohya(trained, tmp_path / "theirs.safetensors")
    words = [f"adapter.start={file}", "optim.lr=0.0", "trainer.epochs=1", "adapter.rank=5"]
    with pytest.raises(AdapterError, match=r"has layers in text_encoder, which isn't trained here; adapter\.text_enc"):
        run(sd, photos, tmp_path / "refused", *words)
    second = run(sd, photos, tmp_path / "second", *words, "adapter.text_encoder=true")
    mine = read_adapter(second.artifact)
    assert mine.layers.keys() == trained.layers.keys()
    assert [one["data"] for one in mine.about["trainings"]] == [trained.about["data"]]  # the same, once
    others = shutil.copytree(photos, tmp_path / "others")
    third = run(sd, others, tmp_path / "third", *words, "adapter.text_encoder=true")
    told = [one["data"]["root"] for one in read_adapter(third.artifact).about["trainings"]]
    assert told == [str(others), str(photos)]
    for name, weights in trained.layers.items():
        torch.testing.assert_close(tiny.delta(mine.layers[name]), tiny.delta(weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("build", [tiny.stable_diffusion_3, tiny.flux])
def test_transformers_learn_a_flow(build, photos, tmp_path):
    build(tmp_path / "words").save_pretrained(tmp_path / "pipe")
    result = run(tmp_path / "pipe", photos, tmp_path / "run", "data.size=16", "objective.min_snr_gamma=null")
    with pytest.raises(ConfigError, match=r"flow matching: set objective\.min_snr_gamma=null"):
        run(tmp_path / "pipe", photos, tmp_path / "other", "data.size=16")
    adapter = read_adapter(result.artifact)
    assert all(name.startswith("transformer.") and weights.lora_B.any() for name, weights in adapter.layers.items())
    vislora.apply(build(tmp_path / "words"), adapter)


def test_more_pixels_than_there_are_positions_for_are_refused(photos, tmp_path):
    pipe = tiny.stable_diffusion_3(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "pipe")
    most = 8 * 2 * pipe.vae_scale_factor  # positions, their size in latents, that of a latent
    words = [f"data.size={most + 16}", "objective.min_snr_gamma=null"]
    with pytest.raises(ConfigError, match=f"sides of {most + 16} pixels; .*Pipeline can't go over {most}"):
        run(tmp_path / "pipe", photos, tmp_path / "run", *words)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        pipe("a bird", height=most + 16, width=most + 16, num_inference_steps=1)


def test_dora_is_trained_and_written(sd, photos, tmp_path):
    result = run(sd, photos, tmp_path, "adapter.dora=true", "adapter.targets=[q,v]", "adapter.attention=[cross]")
    adapter = read_adapter(result.artifact)
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"to_q", "to_v"}
    assert all("attn2" in name and weights.magnitude is not None for name, weights in adapter.layers.items())


@pytest.mark.parametrize("cache", ["true", "false"])
def test_text_encoders_learn_too_where_they_are_asked_to(sd, photos, tmp_path, cache):
    words = ["adapter.text_encoder=true", f"data.cache={cache}"]
    adapter = read_adapter(run(sd, photos, tmp_path, *words).artifact)
    text = [weights for name, weights in adapter.layers.items() if name.startswith("text_encoder.")]
    assert len(text) == 2 * 4
    assert all(weights.lora_B.any() for weights in text)


def test_buckets_keep_the_pictures_proportions(sd, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(vislora.tasks.diffusion, "bucket_sizes", partial(bucket_sizes, step=16))  # 192 pixels take long
    words = ["data.size=48", "objective.before_after=0", "trainer.epochs=1", "trainer.batch_size=7"]
    run(sd, photos, tmp_path / "squares", *words)
    run(sd, photos, tmp_path / "buckets", *words, "data.buckets=true")
    assert len(losses(tmp_path / "squares")) == 1
    assert len(losses(tmp_path / "buckets")) == 2  # four tall pictures, and three squares


def test_buckets_that_would_all_be_squares_are_refused(sd, photos, tmp_path):
    with pytest.raises(ConfigError, match=r"pictures of 96 pixels have no buckets.*multiple of that from 192 on, or"):
        run(sd, photos, tmp_path, "data.buckets=true", "data.size=96")
    with pytest.raises(ConfigError, match=r"data\.size=128 has no bucket but the square; .*data\.buckets=false"):
        run(sd, photos, tmp_path, "data.buckets=true", "data.size=128")


def test_the_class_is_shown_as_often_as_the_subject(sd, photos, tmp_path, capsys):
    words = ["data.prompt=sks", "data.prior.prompt=a", "data.prior.count=3", "data.prior.weight=0.5"]
    run(sd, photos, tmp_path, *words)
    assert "7 pictures, 3 of the class" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 2 * -(-14 // 3)


def test_pictures_of_the_class_that_can_not_be_used_are_told(sd, photos, tmp_path):
    folder = tmp_path / "class"
    shutil.copytree(photos, folder)
    (folder / "torn.png").write_bytes(b"no picture")
    words = ["data.prompt=sks", "data.prior.prompt=a", f"data.prior.images={folder}", "trainer.epochs=1"]
    run(sd, photos, tmp_path / "run", *words)
    (found,) = json.loads((tmp_path / "run" / "data.json").read_text())["findings"][:1]
    assert "torn.png" in json.dumps(found)


def test_a_prompt_of_the_class_that_is_no_caption_is_told_by_its_key(sd, photos, tmp_path):
    words = ["data.prompt=sks", "data.prior.prompt=''", f"data.prior.images={photos}"]
    with pytest.raises(DataError, match=r"^data\.prior\.prompt: the caption is empty"):
        run(sd, photos, tmp_path, *words)


@pytest.mark.parametrize("place", [".", "class"])
def test_pictures_that_would_be_of_the_subject_and_of_the_class_are_refused(sd, photos, tmp_path, place):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    shutil.copytree(photos, root / "class")
    words = ["data.prompt=sks", "data.prior.prompt=a", f"data.prior.images={root / place}"]
    with pytest.raises(DataError, match=r"data\.prior\.images=.*0\.png.* would be learned as the subject too"):
        run(sd, root, tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=diffusion"], "combined with the chosen model; model can be: diffusers, sd_embedded$"),
        (["model=sd_embedded"], "objective=recognition can't be combined with the chosen model; .*: embedded, timm$"),
        (["recipe=sd15_style", "adapter=dora", "data.root=x"], "the chosen adapter; adapter can be: unet_lora$"),
        (["adapter=unet_lora"], "adapter can be: dora, full, lora, lora_mlp, lora_qv, pissa, probe$"),
        (["objective=diffusion", "model=sd_embedded"], "the chosen data; data can be: birds_captions, captions$"),
        (["recipe=sketch_style", "optim.head_lr=1e-3"], r"optim\.head_lr=0\.001: pipelines have no head"),
        (["optim.head_lr=0"], r"optim\.head_lr=0: the head would stay as it was drawn"),
        (["adapter=probe", "optim.head_lr=0"], r"optim\.head_lr=0: the head would stay as it was drawn"),
        (["adapter=full", "optim.b_lr_ratio=8"], r"optim\.b_lr_ratio=8: the chosen adapter has no lora_B"),
        (["adapter=probe", "optim.b_lr_ratio=8"], r"optim\.b_lr_ratio=8: the chosen adapter has no lora_B"),
    ],
)
def test_what_doesnt_go_together_is_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(configure("train", words), tmp_path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.size=30", "data.size=30: expected a multiple of 8 pixels"),
        ("data.size=0", "data.size=0: expected 1 or more"),
        ("data.prior.images=nowhere", "data.prior.images=.*nowhere: there is no such folder"),
        ("model.variant=fp16", "model.variant=null takes files without a variant"),
    ],
)
def test_what_cant_be_drawn_or_read_is_refused_before_the_first_step(sd, photos, tmp_path, word, message):
    with pytest.raises((ConfigError, DataError, ModelError), match=message):
        run(sd, photos, tmp_path, "data.prior.prompt=a", word)
    assert not (tmp_path / "metrics.jsonl").exists()


def hub(root: Path, name: str, pipe, variant=None) -> dict[str, str]:
    """Lay a pipeline out as the hub's cache does, and the environment that finds it, with no hub."""
    repo = root / f"models--{name.replace('/', '--')}"
    pipe.save_pretrained(repo / "snapshots" / "0123abcd", variant=variant)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    return os.environ | {"HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1", "VISLORA_CACHE": str(root / "cache")}


SMALL = ["data.size=64", "data.buckets=false", "trainer.epochs=1", "data.repeats=1", "adapter.rank=2"]
SMALL += ["trainer.precision=fp32", "trainer.progress=false", "trainer.workers=0", "logger.trackers=[]"]
SMALL += ["objective.preview_steps=1"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sd15_style", "sdxl_style", "sd15_dreambooth"])
def test_a_hub_recipe_runs_to_its_end(recipe, photos, tmp_path):
    xl = recipe.startswith("sdxl")
    name = "stabilityai/stable-diffusion-xl-base-1.0" if xl else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pipe = (tiny.stable_diffusion_xl if xl else tiny.stable_diffusion)(tmp_path / "words")
    environment = hub(tmp_path / "hub", name, pipe, "fp16" if xl else None)
    words = [f"recipe={recipe}", f"data.root={photos}", *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    words += ["data.prior.count=4"] if recipe == "sd15_dreambooth" else []
    command = [sys.executable, "-m", "vislora.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)


@pytest.mark.slow
def test_a_model_that_is_nowhere_is_told_in_one_sentence(photos, tmp_path):
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vislora.train", "recipe=sd15_style", f"data.root={photos}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "diffusers can't open stable-diffusion-v1-5/stable-diffusion-v1-5" in done.stderr
    assert done.stderr.count("\n") == 1
