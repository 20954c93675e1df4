"""Pictures come out as the settings in them say, adapters act as apply says, and mistakes are told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchLCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
)
from PIL import Image

import vislora
from vislora.compose import configure
from vislora.config.model import ModelConfig
from vislora.drawing import _own_noise
from vislora.errors import ConfigError
from vislora.export import export
from vislora.formats.detect import read_adapter, write_adapter
from vislora.formats.peft import write_peft
from vislora.generate import Generated, _quoted, generate
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.models.vit import build_vit

PROMPT = "a blue jay, facing left"


@pytest.fixture(scope="module")
def style(base, tmp_path_factory) -> Path:
    """An adapter's file that says what it was trained on."""
    adapter = tiny.trained(tiny.stable_diffusion(tmp_path_factory.mktemp("words")))
    adapter = replace(adapter, about={"model": {"name": str(base), "revision": None, "variant": None}})
    return write_adapter(adapter, "diffusers", tmp_path_factory.mktemp("style") / "style.safetensors")


def run(out: Path, *words: str) -> list[Generated]:
    common = ["steps=2", "size=16", f"prompt=['{PROMPT}']"]
    return generate(configure("generate", [*common, *words]), out)


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_settings_in_a_picture_draw_it_again(base, style, tmp_path):
    words = ["adapter.scale=0.7", "seeds=[5]", "negative_prompt=blurred", "size=[32,16]"]
    (picture,) = run(tmp_path, f"adapter={style}", *words)
    settings = json.loads(Image.open(picture.file).text["vislora"])
    assert settings == picture.settings
    assert settings["size"] == [32, 16]  # width and height
    assert settings["precision"] == "fp32"  # what auto is on a CPU
    pipe = StableDiffusionPipeline.from_pretrained(settings["model"]["name"], safety_checker=None)
    vislora.apply(pipe, settings["adapters"][0]["file"], scale=settings["scale"])
    again = pipe(
        settings["prompt"],
        negative_prompt=settings["negative_prompt"],
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        height=settings["size"][1],
        width=settings["size"][0],
        generator=torch.Generator().manual_seed(settings["seed"]),
    ).images[0]
    assert np.array_equal(pixels(picture.file), np.asarray(again))


def test_settings_tell_an_adapter_from_another_under_the_same_name(style, tmp_path):
    file = tmp_path / style.name
    adapter = read_adapter(style)
    told = []
    for kept in (len(adapter.layers), 1):
        write_adapter(replace(adapter, layers=dict(list(adapter.layers.items())[:kept])), "diffusers", file)
        (picture,) = run(tmp_path / str(kept), f"adapter={file}")
        told += picture.settings["adapters"]
    whole, cut = told
    assert whole | {"contents": cut["contents"]} == cut
    assert whole["contents"] != cut["contents"]
    write_adapter(adapter, "diffusers", file)
    assert run(tmp_path / "again", f"adapter={file}")[0].settings["adapters"] == [whole]


def test_a_prompt_that_isnt_read_to_its_end_is_told(base, tmp_path, capsys):
    generate(configure("generate", ["model.name=" + str(base), "prompt=[a b c]", "steps=1", "size=16"]), tmp_path / "1")
    assert capsys.readouterr().err == ""
    words = ["model.name=" + str(base), f"prompt=[{'a ' * 14}x,b]", "steps=1", "size=16"]
    generate(configure("generate", words), tmp_path / "2")
    told = capsys.readouterr().err
    assert told == f"prompts of more than the 16 tokens that are read, hence drawn without their end: '{'a ' * 14}x'\n"


def test_a_seed_is_one_picture_where_the_scheduler_draws_noise_of_its_own(tmp_path):
    pipe = tiny.stable_diffusion_3(tmp_path / "words")
    pipe.scheduler = FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "lcm")
    state = torch.get_rng_state()
    drawn = [run(tmp_path / out, f"model.name={tmp_path / 'lcm'}", "seeds=[0,1]") for out in ("once", "again")]
    once, again = ([pixels(picture.file) for picture in pictures] for pictures in drawn)
    assert np.array_equal(once, again)
    assert not np.array_equal(once[0], once[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_schedulers_own_noise_is_another_than_that_which_a_picture_begins_with():
    before = torch.get_rng_state()
    with _own_noise(7):
        own = torch.randn(64)
    assert torch.equal(torch.get_rng_state(), before)
    first = torch.randn(64, generator=torch.Generator().manual_seed(7))
    assert torch.corrcoef(torch.stack([own, first]))[0, 1].abs() < 0.5


def test_settings_are_told_in_the_words_that_viewers_look_for(style, tmp_path):
    (picture,) = run(tmp_path, f"adapter={style}", "negative_prompt=blurred", "seeds=[3]")
    lines = Image.open(picture.file).text["parameters"].splitlines()
    assert lines[:2] == [PROMPT, "Negative prompt: blurred"]
    assert lines[2].startswith("Steps: 2, CFG scale: 5.0, Seed: 3, Size: 16x16, Model: ")


def test_sweep_draws_every_seed_at_every_scale_and_a_sheet(base, style, tmp_path):
    drawn = run(tmp_path / "swept", f"adapter={style}", "scales=[0,0.5,1]", "seeds=[1,2]")
    assert [(p.settings["seed"], p.settings["scale"]) for p in drawn] == [(s, x) for s in (1, 2) for x in (0, 0.5, 1)]
    assert (tmp_path / "swept" / "grid.png").is_file()
    plain = run(tmp_path / "plain", f"model.name={base}", "seeds=[1,2]")
    alone = run(tmp_path / "alone", f"adapter={style}", "adapter.scale=0.5", "seeds=[2]")
    images = [pixels(picture.file) for picture in drawn]
    for one, other in ((images[0], plain[0]), (images[3], plain[1]), (images[4], alone[0])):
        assert np.array_equal(one, pixels(other.file))
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def test_rows_of_a_sweep_are_told_by_what_differs(base, style, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("vislora.report.sheets.save_grid", lambda rows, captions, file, names: told.append(names))
    for words in (["seeds=[1,2]"], ["prompt=[one,two]"], ["prompt=[one,two]", "seeds=[1,2]"], ["seeds=[1]"]):
        run(tmp_path / str(len(told)), f"adapter={style}", "scales=[0,1]", *words)
    both = ["seed 1: one", "seed 2: one", "seed 1: two", "seed 2: two"]
    assert told == [["seed 1", "seed 2"], ["one", "two"], both, [""]]


def test_sheet_has_the_pictures_in_its_cells(base, tmp_path):
    drawn = run(tmp_path, f"model.name={base}", "prompt=[one,two]", "seeds=[1,2]")
    sheet = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    gap, side, line = 6, 160 + 6, 15
    told = [sheet[gap + row * (side + line) + side - 6 :][:line] for row in (0, 1)]
    assert all((seed < 128).any() for seed in told)
    assert not np.array_equal(*told)
    for picture in drawn:
        column, row = ["one", "two"].index(picture.settings["prompt"]), picture.settings["seed"] - 1
        top, left = gap + row * (side + line), gap + column * side
        cell = sheet[top : top + 160, left : left + 160]
        enlarged = Image.open(picture.file).resize((160, 160), Image.Resampling.BICUBIC)
        assert np.array_equal(cell, np.asarray(enlarged))


def test_several_adapters_act_with_their_weights(base, style, tmp_path):
    other = tiny.trained(tiny.stable_diffusion(tmp_path / "words"), components=["unet"], alpha=lambda name: 2.0)
    file = write_adapter(other, "kohya", tmp_path / "other.safetensors")
    (picture,) = run(
        tmp_path, f"adapter=[{style},{file}]", "weights=[0.5,-1]", "adapter.scale=0.9", f"model.name={base}"
    )
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    vislora.apply(pipe, [style, other], scale=0.9, weights=[0.5, -1])
    noise = torch.Generator().manual_seed(0)
    wanted = pipe(PROMPT, num_inference_steps=2, guidance_scale=5.0, height=16, width=16, generator=noise).images[0]
    assert np.array_equal(pixels(picture.file), np.asarray(wanted))


@pytest.mark.slow
def test_command_takes_a_prompt_with_commas_as_it_is(style, tmp_path):
    words = [f"adapter={style}", "prompt=it's a jay, facing left [really]", "steps=1", "size=16"]
    words.append(f"hydra.run.dir={tmp_path / 'out'}")
    done = subprocess.run([sys.executable, "-m", "vislora.generate", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").glob("*.png")
    assert str(file) in done.stdout
    assert json.loads(Image.open(file).text["vislora"])["prompt"] == "it's a jay, facing left [really]"


@pytest.mark.parametrize(
    "text",
    ["a, b [c]", "[v] dog, sitting", "'tis a jay", "it's a\\'b\\", '"one" and "two"', "${x} $y {z} = 鳥 # (a:1.2)", ""],
)
def test_bare_prompts_mean_what_they_say(text):
    config = configure("generate", [_quoted(f"prompt={text}"), _quoted(f"negative_prompt={text}")])
    assert config.prompt == [text]
    assert config.negative_prompt == text


def test_prompts_in_hydras_own_words_are_left_to_it():
    words = ["prompt='a, b'", "prompt=[a,'b, c']", "negative_prompt=null", 'negative_prompt="a, b"']
    found = [configure("generate", ["prompt=[x]", _quoted(word)]) for word in words]
    assert [config.prompt for config in found[:2]] == [["a, b"], ["a", "b, c"]]
    assert [config.negative_prompt for config in found[2:]] == [None, "a, b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=0"], r"size=0: expected pixels, size=512 for both sides, or size=\[WIDTH,HEIGHT\]"),
        (["size=[16]"], r"size=\[16\]: expected pixels"),
        (["steps=0"], "steps=0: expected 1 or more"),
        (["seeds=[99999999999999999999]"], "seeds: 99999999999999999999 is no number of 64 bits"),
        (["weights=[1]"], r"weights=\[1.0\] for 1 adapters; weights are for several, one for each"),
        (["guidance=nan"], "guidance=nan: expected a finite number"),
        (["scales=[0,inf]"], "scales=inf: expected a finite number"),
        (["adapter.scale=nan"], r"adapter\.scale=nan: expected a finite number"),
        (["scales=[]"], "scales is empty"),
        (["prompt=[]"], "prompt is empty"),
        (["prompt=[a,'b\udcff']"], r"'b\\udcff' holds half a character; write the prompt in UTF-8"),
        (["negative_prompt='\udcff'"], r"'\\udcff' holds half a character"),
    ],
)
def test_settings_that_make_no_sense_are_refused(style, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "out", f"adapter={style}", *words)
    assert not (tmp_path / "out").exists()


def test_what_the_pipeline_refuses_is_told_in_one_sentence(base, tmp_path):
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline can't draw that: .* divisible by 8 but are 15"):
        run(tmp_path, f"model.name={base}", "size=15")


def test_a_pipeline_that_draws_no_pictures_of_prompts_is_refused(tmp_path):
    sd = tiny.stable_diffusion(tmp_path / "words")
    models = {name: getattr(sd, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    size = {"block_out_channels": (8, 16), "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    motion = MotionAdapter(**size, motion_layers_per_block=1)
    AnimateDiffPipeline(**models, motion_adapter=motion).save_pretrained(tmp_path / "video")
    with pytest.raises(ConfigError, match=r"AnimateDiffPipeline draws videos, .*; give a text-to-image pipeline with"):
        run(tmp_path / "out", f"model.name={tmp_path / 'video'}")
    DDPMPipeline(sd.unet, DDPMScheduler()).save_pretrained(tmp_path / "unconditional")
    with pytest.raises(ConfigError, match="DDPMPipeline takes no prompt: it can't be asked for pictures of prompts"):
        run(tmp_path / "out", f"model.name={tmp_path / 'unconditional'}")
    assert not (tmp_path / "out").exists()


def test_a_negative_prompt_without_guidance_is_refused():
    with pytest.raises(ConfigError, match=r"guidance=1\.0 draws without a negative prompt"):
        configure("generate", ["prompt=[a bird]", "guidance=1", "negative_prompt=blurry"])


def test_a_negative_prompt_that_would_be_ignored_is_refused(tmp_path):
    tiny.flux(tmp_path / "words").save_pretrained(tmp_path / "flux")
    with pytest.raises(ConfigError, match="FluxPipeline pays no heed to a negative prompt"):
        run(tmp_path / "out", f"model.name={tmp_path / 'flux'}", "negative_prompt=blurred")


def test_scales_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"scales=.* are an adapter's; give one with adapter=FILE"):
        run(tmp_path, "scales=[0,1]")


def test_a_scale_without_an_adapter_is_refused():
    with pytest.raises(ConfigError, match=r"adapter\.scale=0\.5 is an adapter's; give one with adapter=FILE"):
        configure("generate", ["prompt=[a bird]", "adapter.scale=0.5"])


@pytest.mark.parametrize("name", ["generate", "evaluate"])
@pytest.mark.parametrize("word", ["model.revision=main", "model.variant=fp16"])
def test_a_revision_or_variant_of_no_named_model_is_refused(name, word):
    words = ["adapter=A", word] + (["prompt=[a bird]"] if name == "generate" else [])
    with pytest.raises(ConfigError, match=f"{word} is of a model that is named, .*; give model.name too"):
        configure(name, words)
    assert configure(name, [*words, "model.name=x"]).model.name == "x"


def test_pictures_drawn_before_are_not_overwritten(base, tmp_path):
    (picture,) = run(tmp_path, f"model.name={base}")
    before = picture.file.read_bytes()
    with pytest.raises(ConfigError, match="holds drawn pictures already; choose another folder"):
        run(tmp_path, f"model.name={base}", "guidance=1")
    assert picture.file.read_bytes() == before


def test_adapter_of_a_recogniser_is_sent_to_predict(tmp_path):
    model = build_vit(ModelConfig("test_vit", weights="random"), 2)
    adapters = Adapters(model)
    adapters.add("birds", [TargetLayer("blocks.0.attn.qkv")], LoraSettings(2, 2.0))
    about = {"model": {"name": "embedded"}, "classes": ["jay", "owl"]}
    write_peft(replace(adapters.adapter("birds"), about=about), tmp_path / "birds")
    with pytest.raises(
        ConfigError, match=r"birds is a recogniser's adapter, .*; use python -m vislora\.predict adapter"
    ):
        run(tmp_path / "out", f"adapter={tmp_path / 'birds'}")


def test_model_is_asked_for_where_no_adapter_says_it(base, style, tmp_path):
    adapter = read_adapter(style)
    silent = write_adapter(replace(adapter, about={}), "kohya", tmp_path / "silent.safetensors")
    with pytest.raises(ConfigError, match=r"silent.safetensors doesn't say what model it belongs to; give model.name"):
        run(tmp_path, f"adapter={silent}")
    about = {"model": {"name": "somewhere/else"}}
    other = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"was trained on somewhere/else, .*; choose with model.name"):
        run(tmp_path, f"adapter=[{style},{other}]")


# --- Export to another format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_exported_adapter_draws_the_same_pictures(base, style, tmp_path, to):
    out = export(configure("export", [f"adapter={style}", f"to={to}", f"out={tmp_path / 'exported'}"]))
    pictures = [
        run(tmp_path / name, f"adapter={file}", f"model.name={base}")[0].file
        for name, file in (("as trained", style), ("exported as another", out))
    ]
    assert np.abs(pixels(pictures[0]).astype(int) - pixels(pictures[1])).max() <= 1
    assert read_adapter(out).about == read_adapter(style).about


def test_place_that_is_taken_is_not_overwritten(style, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"x.safetensors is there already; choose another place"):
        export(configure("export", [f"adapter={style}", "to=kohya", f"out={tmp_path / 'x.safetensors'}"]))
    assert (tmp_path / "x.safetensors").read_bytes() == b"precious"


def test_pipelines_adapter_is_not_merged_into_a_timm_model(style, tmp_path):
    with pytest.raises(ConfigError, match="is of a pipeline, and to=merged writes timm models; choose to=diffusers"):
        export(configure("export", [f"adapter={style}", f"out={tmp_path / 'out'}"]))
