"""Evaluations of adapters that draw: every figure again from the pictures on disk, by other code; the files and the
report; and mistakes."""

import csv
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny_diffusion as tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn
from torchvision.transforms import v2

from vislora.compose import configure
from vislora.config.data import CaptionsData, data_to_dict
from vislora.config.model import ModelConfig
from vislora.data import splits
from vislora.data.images import read_image
from vislora.data.load import load_captions
from vislora.data.prompts import noise_seed
from vislora.data.transforms import Preprocessing
from vislora.errors import AdapterError, ConfigError, DataError, ModelError
from vislora.evaluate import _main, draws
from vislora.files import sha256
from vislora.formats.detect import read_adapter, write_adapter
from vislora.generate import generate
from vislora.models.clip import Clip
from vislora.models.vit import EMBEDDED, build_vit, save_vit
from vislora.picture_evaluation import _wanted_style, evaluate_pictures
from vislora.recognizer import Recognizer, load_recognizer
from vislora.report.pictures import pictures_table, write_pictures

PROMPTS = ["a | one", "b | two", "c, d | one", "e | two"]
WORDS = ["steps=2", "size=16", "unrelated=[x,y]", f"prompts={PROMPTS}", "resamples=50"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six captioned pictures."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {chr(ord('a') + i)}")
    return root


@pytest.fixture(scope="module")
def style(base, photos, tmp_path_factory) -> Path:
    """An adapter's file that says what it was trained on."""
    folder = tmp_path_factory.mktemp("style")
    about = {"model": {"name": str(base), "revision": None, "variant": None}}
    about["data"] = data_to_dict(CaptionsData(root=str(photos)))
    adapter = replace(tiny.trained(tiny.stable_diffusion(folder)), about=about)
    return write_adapter(adapter, "diffusers", folder / "style.safetensors")


@pytest.fixture(scope="module")
def judge(base, photos, tmp_path_factory) -> Path:
    """The folder of a classifier with random weights, who finds either class among drawn pictures, and among photos."""
    folder = tmp_path_factory.mktemp("judge")
    args = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
    torch.manual_seed(2)
    model = build_vit(ModelConfig("vit_tiny_patch16_224", weights="random", args=args), 2)
    images = Preprocessing(32, (0.5,) * 3, (0.5,) * 3).to_dict()
    about = {"preprocessing": images, "classes": ["one", "two"], "model": {}, "data": {}}
    save_vit(model, folder, about)
    words = [f"model.name={base}", f"prompt={PROMPTS}", "steps=2", "size=16"]
    drawn = [picture.image for picture in generate(configure("generate", words), folder / "drawn")]
    recognizer, seen = load_recognizer(folder), []
    recognizer.model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean(0)))
    with torch.no_grad():
        recognizer(drawn)
        recognizer([Image.open(file) for file in sorted(photos.glob("*.png"))])
        means = torch.linalg.qr(torch.stack(seen).t()).Q
        direction = torch.randn(48, generator=torch.Generator().manual_seed(6))
        model.head.weight[0] = 0
        model.head.weight[1] = direction - means @ (means.t() @ direction)  # the mean of either set is in the middle
    save_vit(model, folder, about)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """The folder of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    words = tiny.tokenizer(folder / "words")
    text = tiny.clip().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    torch.manual_seed(3)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**sides), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(style, judge, clip, tmp_path_factory):
    """An adapter at three scales before all judges, and the folder of what was found."""
    words = [f"adapter={style}", *WORDS, "scales=[0,0.5,1]", "drawn_at_once=3", f"clip={clip}"]
    words += [f"style_classifier={judge}", f"content_classifier={judge}"]
    config, out = configure("evaluate", words), tmp_path_factory.mktemp("out")
    found = evaluate_pictures(config)
    write_pictures(found, config, out)
    return found, out


def as_the_command(config):
    assert draws(config)
    return evaluate_pictures(config)


def rows_of(out):
    with (out / "pictures.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def features(pictures):
    """Pooled features of the model that ships, by timm alone, float64 [N, D]."""
    model = timm.create_model(f"local-dir:{EMBEDDED}", pretrained=True, num_classes=0).eval()
    wanted = resolve_data_config({}, model=model)
    transform = v2.Compose(
        [
            v2.Resize(int(wanted["input_size"][-1] / wanted["crop_pct"]), v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(wanted["input_size"][-1]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(wanted["mean"], wanted["std"]),
        ]
    )
    with torch.no_grad():
        return model(torch.stack([transform(picture) for picture in pictures])).double()


def test_pictures_are_what_generate_draws_with_the_seed_that_is_told(evaluated, base, style, tmp_path):
    _, out = evaluated
    rows = rows_of(out)
    assert len(rows) == 4 * len(PROMPTS) * 2
    row = next(row for row in rows if row["name"].endswith("scale 0.5") and row["prompt"] == "c, d")
    words = [f"adapter={style}", "adapter.scale=0.5", "prompt=['c, d']", f"seeds=[{row['noise_seed']}]"]
    (again,) = generate(configure("generate", [*words, "steps=2", "size=16"]), tmp_path)
    told = np.asarray(Image.open(out / row["file"])).astype(int)
    assert np.abs(told - np.asarray(again.image).astype(int)).max() <= 1  # a batch rounds otherwise than one picture
    assert len({row["noise_seed"] for row in rows}) == len(PROMPTS) * 2


def test_content_and_diversity_are_those_of_timms_features(evaluated):
    found, out = evaluated
    rows = rows_of(out)
    pictures = [Image.open(out / row["file"]).convert("RGB") for row in rows]
    seen = features(pictures).reshape(4, len(PROMPTS), 2, -1)  # base, then the scales
    for row, pooled in zip(found.rows[1:], seen, strict=True):
        cosines = torch.cosine_similarity(pooled, seen[0], dim=-1)
        assert row.figures["content"].value == pytest.approx(cosines.mean().item(), abs=1e-6)
        apart = 1 - torch.cosine_similarity(pooled[:, 0], pooled[:, 1], dim=-1)
        assert row.figures["diversity"].value == pytest.approx(apart.mean().item(), abs=1e-6)
    told = [float(row["content"]) for row in rows[-8:]]
    assert np.mean(told) == pytest.approx(found.rows[-1].figures["content"].value)


def test_distances_are_those_of_timms_features(evaluated, photos):
    found, out = evaluated
    last = [Image.open(out / row["file"]).convert("RGB") for row in rows_of(out)[-8:]]
    drawn, real = (features(p).numpy() for p in (last, [Image.open(f) for f in sorted(photos.glob("*.png"))]))
    covariances = [np.cov(x, rowvar=False) for x in (drawn, real)]
    # the trace of the root of a product of covariances is the nuclear norm of the product of their factors
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (drawn, real)]
    root = np.linalg.norm(centred[0] @ centred[1].T, "nuc")
    frechet = ((drawn.mean(0) - real.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root
    assert found.rows[-1].figures["frechet"].value == pytest.approx(frechet, rel=1e-4)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    prompts = np.arange(4).repeat(2), np.arange(6)  # pictures of one prompt make no pair
    within = [kernel(x, x)[of[:, None] != of].mean() for x, of in zip((drawn, real), prompts, strict=True)]
    expected = sum(within) - 2 * kernel(drawn, real).mean()
    assert found.rows[-1].figures["kernel"].value == pytest.approx(expected, rel=1e-4)


def test_at_scale_0_an_adapter_is_the_base_model(evaluated):
    reference, base, zero, half, one = evaluated[0].rows
    assert (reference.name, base.name, zero.scale, half.scale, one.scale) == ("reference", "base model", 0, 0.5, 1)
    assert zero.figures == base.figures
    assert zero.figures["content"].value == pytest.approx(1)
    assert zero.figures["drift"].value == pytest.approx(0, abs=1e-9)
    assert zero.figures["style"].value == pytest.approx(0, abs=1e-9)
    assert one.figures["drift"].value > half.figures["drift"].value > 1e-6
    assert one.figures["content"].low <= one.figures["content"].value <= one.figures["content"].high < 1


def test_classifiers_are_asked_picture_by_picture(evaluated, judge, photos):
    found, out = evaluated
    recognizer, labels = load_recognizer(judge), [line.partition(" | ")[2] for line in PROMPTS for _ in range(2)]
    of_reference = [recognizer.classes[recognizer([Image.open(f)]).argmax()] for f in photos.glob("*.png")]
    assert of_reference.count(found.style) > 3 > of_reference.count("one" if found.style == "two" else "two") > 0
    assert found.rows[0].figures["style_class"].value == pytest.approx(of_reference.count(found.style) / 6)
    all_taken = []
    for drawn in found.rows[1:]:
        rows = [row for row in rows_of(out) if row["name"] == drawn.name]
        assert [row["label"] for row in rows] == labels
        taken = [recognizer.classes[recognizer([Image.open(out / row["file"])]).argmax()] for row in rows]
        right = [one == other for one, other in zip(taken, labels, strict=True)]
        assert [float(row["content_class"]) for row in rows] == right
        assert drawn.figures["content_class"].value == pytest.approx(np.mean(right))
        assert drawn.figures["style_class"].value == pytest.approx(np.mean([t == found.style for t in taken]))
        all_taken += taken
    assert set(all_taken) == {"one", "two"}


def test_the_text_image_score_is_a_hundred_times_the_cosine_of_clips_projections(evaluated, clip):
    _, out = evaluated
    model, words = transformers.CLIPModel.from_pretrained(clip), transformers.CLIPTokenizer.from_pretrained(clip)
    rows, found = rows_of(out)[-8:], []
    for row in rows:  # one by one, the pictures prepared by hand: they have CLIP's size already
        pixels = torch.from_numpy(np.array(Image.open(out / row["file"]))).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        tokens = torch.tensor([words(row["prompt"]).input_ids])
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model((pixels - mean) / std).pooler_output)
            read = model.text_projection(model.text_model(tokens).pooler_output)
        found.append(max(0.0, 100 * torch.cosine_similarity(seen.double(), read.double()).item()))
    assert any(found)
    assert [float(row["text_image"]) for row in rows] == pytest.approx(found, rel=1e-5, abs=1e-5)


def test_drift_is_that_of_the_unrelated_prompts(evaluated, style, base, tmp_path):
    drawn = []
    for number, words in enumerate(([f"model.name={base}"], [f"adapter={style}", "adapter.scale=0.5"])):
        pictures = []
        for prompt in ("x", "y"):
            words = [*words, "steps=2", "size=16", f"prompt={[prompt]}"]
            seeds = f"seeds={[noise_seed(seed, prompt) for seed in (0, 1)]}"
            out = tmp_path / f"{number}{prompt}"
            pictures += [picture.image for picture in generate(configure("generate", [*words, seeds]), out)]
        drawn.append(features(pictures))
    kept = torch.cosine_similarity(*drawn, dim=-1).mean().item()
    assert evaluated[0].rows[3].figures["drift"].value == pytest.approx(1 - kept, rel=0.02)  # drawn one by one


def test_each_adapter_is_taken_out_before_the_next(evaluated, style, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(style.read_bytes())
    found = evaluate_pictures(configure("evaluate", [f"adapter=[{style},{other}]", *WORDS, "drawn_at_once=3"]))
    alone = evaluated[0].rows[-1].figures["content"].value
    assert [row.figures["content"].value for row in found.rows[1:]] == pytest.approx([alone, alone], rel=1e-6)


def test_adapters_that_were_shown_the_same_pictures_in_other_ways_are_compared(style, photos, tmp_path):
    shown = CaptionsData(root=str(photos), size=16, hflip=0.5, repeats=2, cache=False)
    adapter = read_adapter(style)
    about = adapter.about | {"data": data_to_dict(shown)}
    other = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "other.safetensors")
    found = evaluate_pictures(configure("evaluate", [f"adapter=[{style},{other}]", *WORDS]))
    assert found.rows[1].figures == found.rows[2].figures


def test_sheets_and_sliders_show_the_first_seed_and_the_scale_nearest_to_1(style, tmp_path):
    config = configure("evaluate", [f"adapter={style}", *WORDS, "scales=[0.9,2]"])
    write_pictures(evaluate_pictures(config), config, tmp_path)
    rows = rows_of(tmp_path)
    captions = json.loads((tmp_path / "before_after" / "captions.json").read_text())
    assert list(captions.values()) == [line.partition(" | ")[0] for line in PROMPTS]
    for name, caption in captions.items():
        for which, row_name in (("before", "base model"), ("after", "style.safetensors, scale 0.9")):
            (row,) = (r for r in rows if (r["name"], r["prompt"], r["seed"]) == (row_name, caption, "0"))
            shown = Image.open(tmp_path / "before_after" / f"{name}.{which}.png")
            assert shown.tobytes() == Image.open(tmp_path / row["file"]).tobytes()


def test_the_longest_name_of_a_class_in_a_prompt_is_its_label(style, judge, tmp_path):
    shutil.copytree(judge, tmp_path / "judge")
    about = json.loads((judge / "vislora.json").read_text())
    (tmp_path / "judge" / "vislora.json").write_text(json.dumps(about | {"classes": ["jay", "blue jay"]}))
    config = configure("evaluate", [f"adapter={style}", *WORDS, f"content_classifier={tmp_path / 'judge'}"])
    config = replace(config, prompts=["a Blue Jay", "a jay, no bluejay"])
    found = evaluate_pictures(config)
    classes = load_recognizer(judge)
    taken = [classes([image]).argmax().item() for image in found.rows[-1].images]
    assert found.rows[-1].each["content_class"].tolist() == [t == (1, 1, 0, 0)[i] for i, t in enumerate(taken)]


def test_a_prompt_that_names_two_classes_or_a_part_of_a_word_needs_a_label(style, judge, tmp_path):
    shutil.copytree(judge, tmp_path / "judge")
    about = json.loads((judge / "vislora.json").read_text())
    (tmp_path / "judge" / "vislora.json").write_text(json.dumps(about | {"classes": ["owl", "bowl"]}))
    config = configure("evaluate", [f"adapter={style}", *WORDS, f"content_classifier={tmp_path / 'judge'}"])
    with pytest.raises(DataError, match="'an owl in a bowl' names 'bowl' and 'owl'; tell which one"):
        evaluate_pictures(replace(config, prompts=["a bowl", "an owl in a bowl"]))
    with pytest.raises(DataError, match="'a growler' has no label, and names no class"):
        evaluate_pictures(replace(config, prompts=["a bowl", "a growler"]))


def test_what_cant_be_read_of_the_reference_is_left_out_and_named(style, photos, tmp_path, capsys):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    (mixed / "half.png").write_bytes((photos / "0.png").read_bytes()[:400])
    (mixed / "note.png").write_text("no picture")
    (mixed / "lost.png").symlink_to("/nowhere.png")
    words = [f"adapter={style}", *WORDS]
    config = configure("evaluate", [*words, f"reference={mixed}"])
    found = evaluate_pictures(config)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert told == [f"left out: {what}" for what in found.left_out]
    for name, what in zip(("half", "note", "lost"), found.left_out, strict=True):
        assert what.count(str(mixed / f"{name}.png")) == 1
    assert f"note: left out of the reference: 3 ({mixed / 'half.png'} can't be decoded" in pictures_table(found)
    write_pictures(found, config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["left_out"] == found.left_out
    whole = evaluate_pictures(configure("evaluate", [*words, f"reference={photos}"]))
    assert [row.figures for row in whole.rows] == [row.figures for row in found.rows]
    assert whole.left_out == []
    assert "note.png is no image" in (tmp_path / "out" / "report.html").read_text()


def test_a_reference_without_a_picture_that_can_be_read_is_refused(style, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_text("no picture")
    config = configure("evaluate", [f"adapter={style}", *WORDS, f"reference={tmp_path}"])
    with pytest.raises(DataError, match=r"reference=.* holds no usable picture; 2 were left out, .*a\.png is no image"):
        evaluate_pictures(config)


def test_reference_pictures_are_not_held_all_at_once(style, photos, judge, monkeypatch):
    opened, held = [], []

    def read(*where):
        picture = read_image(*where)
        opened.append(weakref.ref(picture))
        held.append(sum(other() is not None for other in opened))
        return picture

    monkeypatch.setattr(splits, "read_image", read)
    words = [*WORDS, "prompts=[a,b,c,d]", "seeds=[0]", f"style_classifier={judge}"]
    evaluate_pictures(configure("evaluate", [f"adapter={style}", *words, f"reference={photos}"]))
    evaluate_pictures(configure("evaluate", [f"adapter={style}", *words]))
    assert len(held) >= 2 * 6
    assert max(held) <= 2


def test_the_folder_holds_one_table_with_the_backbone_and_a_report_with_everything(evaluated, tmp_path):
    found, out = evaluated
    scores = json.loads((out / "scores.json").read_text())
    assert scores["backbone"]["sha256"] == sha256(EMBEDDED / "model.safetensors")
    with (out / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, values, line in zip(found.rows, scores["rows"], table, strict=True):
        assert values["figures"].get("style", {}).get("value") == (float(line["style"]) if line["style"] else None)
        assert values["name"] == line["name"] == row.name
    assert len(list(out.glob("sweep*.png"))) == len(list(out.glob("sweep*.svg"))) == 2  # features, classifiers
    report = (out / "report.html").read_text()
    assert report.count('<input type="range"') == len(PROMPTS)
    for word in ("Style against content", "Before and after", "what changed", "Samples", scores["backbone"]["sha256"]):
        assert word in report
    assert (out / "report.html").stat().st_size < 3e6
    text = pictures_table(found)
    assert scores["backbone"]["sha256"][:16] in text
    assert "note: 8 drawn and 6 reference pictures are few for features of 192 dimensions" in text


def test_captions_of_the_training_are_drawn_where_no_prompts_are_given(style):
    words = [word for word in WORDS if not word.startswith("prompts")]
    config = configure("evaluate", [f"adapter={style}", *words, "seeds=[0]"])
    found = evaluate_pictures(config)
    assert [prompt.text for prompt in found.prompts] == [f"picture {letter}" for letter in "abcdef"]
    assert "diversity" not in found.rows[-1].figures
    assert found.rows[-1].name == "style.safetensors"


def test_captions_that_were_held_out_are_drawn_where_there_are_some(style, photos, tmp_path):
    data = CaptionsData(root=str(photos), val_fraction=0.34)
    adapter = read_adapter(style)
    about = adapter.about | {"data": data_to_dict(data)}
    file = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "it.safetensors")
    words = [word for word in WORDS if not word.startswith("prompts")]
    found = evaluate_pictures(configure("evaluate", [f"adapter={file}", *words]))
    assert [prompt.text for prompt in found.prompts] == load_captions(data).val.captions
    assert len(found.prompts) == 2


class Brightness(nn.Module):
    """Which of dark and light pictures are."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * self.sign


def test_a_clip_without_its_words_is_refused(clip, tmp_path):
    bare = shutil.copytree(clip, tmp_path / "clip")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=rf"^clip={bare} can't be opened: "):
        Clip(str(bare), torch.device("cpu"))


@pytest.mark.parametrize("wanted", ["dark", "light"])
def test_the_style_is_what_most_of_the_reference_is_taken_for(wanted):
    recognizer = Recognizer(Brightness(), Preprocessing(8, (0.5,) * 3, (0.5,) * 3), ("dark", "light"), {})
    few, most = ("white", "black") if wanted == "dark" else ("black", "white")
    reference = [Image.new("RGB", (8, 8), colour) for colour in (few, most, most)]
    assert _wanted_style(configure("evaluate", ["adapter=unused"]), recognizer, reference) == wanted


def test_any_timm_model_with_weights_from_a_file_is_a_backbone(style, tmp_path):
    model = timm.create_model("test_mambaout")  # its classifier sees more features than its last stage has channels
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = ["backbone.name=test_mambaout", f"backbone.weights={tmp_path / 'w.safetensors'}", "backbone.img_size=64"]
    found = evaluate_pictures(configure("evaluate", [f"adapter={style}", *WORDS, *words]))
    assert found.backbone == ("test_mambaout", sha256(tmp_path / "w.safetensors"))
    assert f"features of {model.head_hidden_size} dimensions" in pictures_table(found)
    with pytest.raises(ModelError, match="backbone: timm has no model 'resnet10x'"):
        evaluate_pictures(configure("evaluate", [f"adapter={style}", *WORDS, "backbone.name=resnet10x"]))


def test_mistakes_are_told_before_anything_is_drawn(style, judge, base, tmp_path):
    def refused(error, message, *words, adapter=style):
        with pytest.raises(error, match=message):
            as_the_command(configure("evaluate", [*WORDS, f"adapter={adapter}", *words]))

    refused(ConfigError, r"seeds=\[\]: expected at least one", "seeds=[]")
    refused(ConfigError, r"scales=\[1.0, 1.0\]: expected at least one, each once", "scales=[1,1]")
    refused(ConfigError, "scales=nan: expected a finite number", "scales=[nan]")
    refused(ConfigError, "backbone.drop_path=0.1 has no effect", "backbone.drop_path=0.1")
    refused(ConfigError, "calibrate is not for .*style.safetensors, which draws", "calibrate=true")
    refused(ConfigError, "give style_classifier=FOLDER", "style=ink")
    refused(ConfigError, "style=ink: .* tells one, two", f"style_classifier={judge}", "style=ink")
    refused(DataError, "'three', the label of 'a', is no class", f"content_classifier={judge}", "prompts=['a | three']")
    refused(DataError, "'a' has no label, and names no class", f"content_classifier={judge}", "prompts=[a]")
    refused(DataError, "3 pictures to draw and 6 of reference: distances need four", "prompts=[a,b,c]", "seeds=[0]")
    refused(DataError, "reference=.*nowhere: there is no such folder", "reference=nowhere")
    refused(ModelError, "clip=./nowhere: there is no such folder", "clip=./nowhere")
    refused(ConfigError, "adapter=nowhere: there is no such file or folder", adapter="nowhere")
    refused(ConfigError, "draws and .* recognises; evaluate them one after the other", adapter=f"[{style},{judge}]")
    with pytest.raises(ConfigError, match=r"prompts is not for .*, which recognises"):
        draws(configure("evaluate", [f"adapter={judge}", "prompts=[a]"]))
    bare = write_adapter(tiny.trained(tiny.stable_diffusion(tmp_path)), "kohya", tmp_path / "bare.safetensors")
    refused(ConfigError, "doesn't tell the pictures of its training; give reference=FOLDER", adapter=bare)
    adapter = read_adapter(style)
    about = adapter.about | {"data": data_to_dict(CaptionsData(root=str(tmp_path)))}
    other = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "other.safetensors")
    refused(ConfigError, "on different pictures; give reference=FOLDER", adapter=f"[{style},{other}]")
    about = adapter.about | {"trainings": [{"data": adapter.about["data"]}, {"data": about["data"]}]}
    both = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "both.safetensors")
    refused(ConfigError, "both.safetensors was trained on different pictures; give reference=FOLDER", adapter=both)
    about |= {"trainings": [{"data": adapter.about["data"]}, {}]}  # with an adapter that told nothing
    part = write_adapter(replace(adapter, about=about), "diffusers", tmp_path / "part.safetensors")
    refused(ConfigError, "part.safetensors doesn't tell the pictures of its training", adapter=part)


def test_an_adapter_of_another_model_is_told_of_by_its_file_before_anything_is_drawn(
    style, base, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr("vislora.picture_evaluation.draw", lambda *_: pytest.fail("drawn"))
    xl = tiny.trained(tiny.stable_diffusion_xl(tmp_path), components=["unet"])
    other = write_adapter(xl, "diffusers", tmp_path / "xl.safetensors")
    words = [f"adapter=[{style},{other}]", *WORDS, f"model.name={base}", f"reference={photos}"]
    with pytest.raises(AdapterError, match=r"xl\.safetensors: .*(this pipeline has no module|has shape)"):
        evaluate_pictures(configure("evaluate", words))


def test_a_folder_that_holds_an_evaluation_is_refused_before_anything_is_drawn(evaluated, style, monkeypatch):
    monkeypatch.setattr("vislora.picture_evaluation.evaluate_pictures", lambda config: pytest.fail("drawn"))
    with pytest.raises(ConfigError, match="holds a training or an evaluation already; choose another folder"):
        _main(configure("evaluate", [f"adapter={style}", *WORDS]), evaluated[1])


@pytest.mark.slow
def test_the_command_prints_the_table(style, tmp_path):
    command = [sys.executable, "-m", "vislora.evaluate", f"adapter={style}", *WORDS, f"hydra.run.dir={tmp_path / 'o'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base model" in done.stdout
    assert (tmp_path / "o" / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_find_what_one_does(style, two_processes, tmp_path):
    for count, launch in {1: [sys.executable], 2: two_processes}.items():
        words = [
            f"adapter={style}",
            *WORDS,
            "scales=[0,1]",
            "drawn_at_once=3",
            f"hydra.run.dir={tmp_path / str(count)}",
        ]
        done = subprocess.run([*launch, "-m", "vislora.evaluate", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report.html") == 1
    one, two = ({f.relative_to(tmp_path / c): f for f in (tmp_path / c).rglob("*.*")} for c in "12")
    pictures = [name for name in one if name.suffix == ".png" and "pictures" in name.parts]
    assert len(pictures) == 3 * len(PROMPTS) * 2
    assert two.keys() == one.keys()
    for name in [*pictures, Path("pictures.csv")]:
        assert two[name].read_bytes() == one[name].read_bytes(), name
    found = (json.loads((tmp_path / count / "scores.json").read_text())["rows"] for count in "12")
    for mine, theirs in zip(*found, strict=True):
        for key, figure in mine["figures"].items():  # sums of a matrix library, run twice
            assert figure["value"] == pytest.approx(theirs["figures"][key]["value"], rel=1e-9, abs=1e-12)
