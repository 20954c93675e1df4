"""The commands as a user runs them: train, evaluate, predict, export; and the same in Python."""

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
import yaml
from pages import in_its_own_process
from PIL import Image
from safetensors.torch import load_file, save_file

from vislora.compose import configure
from vislora.config.commands import EvaluateConfig, ExportConfig, ExtractConfig, PredictConfig
from vislora.config.data import ImageFolderData
from vislora.config.model import ModelConfig
from vislora.config.training import Precision
from vislora.data.images import read_image
from vislora.data.transforms import eval_transform
from vislora.errors import AdapterError, ConfigError, DataError, ModelError
from vislora.evaluate import evaluate
from vislora.export import export
from vislora.extract import extract
from vislora.formats.diffusers import write_diffusers
from vislora.formats.peft import read_peft
from vislora.lora import Adapter, LowRankWeights
from vislora.models.vit import build_vit
from vislora.objectives.diffusion import Diffusion
from vislora.objectives.recognition import Recognition
from vislora.precision import new_accelerator
from vislora.predict import _main as tell
from vislora.predict import predict
from vislora.recognizer import load_recognizer
from vislora.tasks.recognition import prepare
from vislora.train import _KINDS, train

BASE = ["model=timm", "model.name=vit_tiny_patch16_224", "model.img_size=32"]
TINY = ["+model.args={patch_size:8,depth:2,embed_dim:48,num_heads:3}"]
RUN = ["trainer.epochs=6", "trainer.batch_size=10", "trainer.progress=false", "trainer.precision=fp32"]
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noisy pictures of three colours in class folders, one of them damaged."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 3, "test": 5}.items():
        for k, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(90, 40, (40, 50, 3))
                pixels[..., k] += 80
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (root / "train" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Base weights in a file, so that the base model can be built again."""
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=0
    )
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(photos, weights, tmp_path_factory):
    """A LoRA training through the command line, in a folder of its own."""
    out = tmp_path_factory.mktemp("run")
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}"]
    words += ["adapter.targets=[q,v,o]", "optim.lr=5e-3", f"hydra.run.dir={out}", "logger.trackers=[]"]
    command = [sys.executable, "-m", "vislora.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_its_settings_figures_problems_adapter_and_evaluation(run, photos):
    out, printed = run
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "adapter", "evaluation",
        "summary.json", "figures", "updates.json", "updates.svg", "updates.png", "report.html",
    }  # fmt: skip
    data = json.loads((out / "data.json").read_text())
    damaged, *_ = data["findings"]
    assert (damaged["kind"], damaged["level"]) == ("damaged", "bad")
    assert damaged["items"][0]["name"] == str(photos / "train" / "red" / "broken.jpg")
    assert data["pictures"] == {"train": 24, "val": 9, "test": 15}
    assert f"data: damaged files: 1; see {out / 'data.json'}" in printed
    assert ", 18 steps, 24 images, 3 classes" in printed
    first, *settings = (out / "config.yaml").read_text().splitlines()
    assert first.startswith("# python -m vislora.train model=timm model.name=vit_tiny_patch16_224 model.img_size=32 ")
    assert yaml.safe_load("\n".join(settings))["model"]["name"] == "vit_tiny_patch16_224"
    scores = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert scores["images"] == 15
    assert scores["top1"] > 0.8  # chance: 0.33
    with (out / "evaluation" / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == list(CLASSES)
    counts = np.array([[int(c) for c in row[1:]] for row in rows[1:]])
    assert counts.sum(1).tolist() == [5, 5, 5]
    assert np.trace(counts) / 15 == pytest.approx(scores["top1"])
    with Image.open(out / "evaluation" / "confusion.png") as picture:
        assert picture.size[0] > 300
    assert f"top-1 {scores['top1']:.1%}" in printed


def test_a_run_of_which_no_figure_will_tell_says_so_as_it_begins(photos, tmp_path, capsys):
    words = [*BASE, *TINY, "model.weights=random", *RUN, "trainer.epochs=1", "logger.trackers=[]", "data=imagefolder"]
    words += [f"data.root={photos / 'train'}"]
    train(configure("train", words), tmp_path / "none")
    printed = capsys.readouterr().out
    assert "24 images, 3 classes; nothing to measure on (data.val_fraction=0.2 would hold some out)" in printed
    train(configure("train", [*words, "data.val_fraction=0.2"]), tmp_path / "some")
    printed = capsys.readouterr().out
    assert "18 images, 3 classes\n" in printed
    assert "best val_top1" in printed


def test_evaluating_the_adapter_again_gives_the_figures_of_the_run(run):
    out, _ = run
    (again,) = evaluate(EvaluateConfig(adapter=[str(out / "adapter")], precision=Precision.fp32))
    assert (
        again.evaluation.to_dict()["per_class"]
        == json.loads((out / "evaluation" / "evaluation.json").read_text())["per_class"]
    )


def test_the_evaluate_command_scores_another_folder(run, photos, tmp_path):
    out, _ = run
    words = [f"adapter={out / 'adapter'}", "data=imagefolder", f"data.root={photos}", "split=train"]
    command = [sys.executable, "-m", "vislora.evaluate", *words, f"hydra.run.dir={tmp_path / 'scores'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of 24 images" in done.stdout
    assert {p.name for p in (tmp_path / "scores").iterdir()} >= {"scores.csv", "scores.json", "report.html"}
    (row,) = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert {p.name for p in (tmp_path / "scores" / row["folder"]).iterdir()} >= {"evaluation.json", "confusion.csv"}


def test_peft_opens_the_adapter_with_the_same_logits(run, photos, weights):
    out, _ = run
    mine = load_recognizer(out / "adapter")
    base = build_vit(
        ModelConfig(
            "vit_tiny_patch16_224",
            str(weights),
            32,
            args={"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3},
        ),
        3,
    )
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert (mine.model(images) - theirs(images)).abs().max() <= 1e-5
        mine.adapters.scale("default", 0.0)
        assert (mine.model(images) - theirs(images)).abs().max() > 1e-2  # the adapter does matter


VARIANTS = {
    "dora": ["adapter=dora", "adapter.dropout=0.1", "adapter.bias=lora_only"],
    "pissa": ["adapter=pissa", "adapter.rslora=true", "+adapter.alpha_pattern={proj:5}", "optim.b_lr_ratio=4"],
    "all": ["adapter.bias=all", "adapter.trained=[norms,patch_embed]", "+adapter.rank_pattern={qkv:3}"],
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS.keys())
def test_peft_opens_what_the_variants_trained_and_the_merged_export_is_the_same(words, photos, weights, tmp_path):
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", *words]
    run = train(configure("train", [*words, "trainer.epochs=1", "logger.trackers=[]"]), tmp_path / "run")
    mine = load_recognizer(run.artifact)
    theirs = peft.PeftModel.from_pretrained(build_vit(ModelConfig(**mine.about["model"]), 3), run.artifact).eval()
    merged = load_recognizer(export(ExportConfig(adapter=str(run.artifact), out=str(tmp_path / "merged"))))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = mine.model(images)
        assert (logits - theirs(images)).abs().max() <= 1e-5
        assert (logits - merged.model(images)).abs().max() <= 1e-5
        mine.adapters.deactivate()
        assert (logits - mine.model(images)).abs().max() > 1e-2


def test_the_merged_export_is_a_timm_model_with_the_same_logits_and_labels(run, tmp_path):
    out, _ = run
    folder = export(ExportConfig(adapter=str(out / "adapter"), out=str(tmp_path / "merged")))
    mine, images = load_recognizer(out / "adapter"), torch.randn(4, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), mine.model(images), rtol=1e-4, atol=1e-5)
    assert not [key for key in load_file(folder / "model.safetensors") if "lora" in key]
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
    merged = load_recognizer(folder)
    assert (merged.classes, merged.preprocessing) == (mine.classes, mine.preprocessing)
    (tmp_path / "file").touch()
    for taken in (folder, tmp_path / "file", out / "adapter"):
        with pytest.raises(ConfigError, match="is there already; choose another place"):
            export(ExportConfig(adapter=str(out / "adapter"), out=str(taken)))
    command = [sys.executable, "-m", "vislora.export", f"adapter={out / 'adapter'}", f"out={tmp_path / 'file' / 'sub'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "can't be used: Not a directory" in done.stderr
    with pytest.raises(ConfigError, match="nothing to merge"):
        export(ExportConfig(adapter=str(folder), out=str(tmp_path / "twice")))


def test_predictions_are_the_models_probabilities_and_the_command_prints_them(run, photos, tmp_path, monkeypatch):
    out, _ = run
    odd = tmp_path / os.fsdecode(b"a, 'b'=c \xe9.png")
    odd.write_bytes((photos / "test" / "red" / "0.png").read_bytes())
    paths = [str(photos / "test" / "green" / "1.png"), str(odd)]
    found = predict(PredictConfig(adapter=str(out / "adapter"), images=paths, top=2))
    mine = load_recognizer(out / "adapter")
    transform = eval_transform(mine.preprocessing)
    for path in paths:
        expected = mine.model(transform(read_image(Path(path)))[None]).softmax(1)[0].sort(descending=True)
        assert [name for name, _ in found[path]] == [CLASSES[k] for k in expected.indices[:2]]
        assert [p for _, p in found[path]] == pytest.approx(expected.values[:2].tolist(), abs=1e-5)
    command = [sys.executable, "-m", "vislora.predict", f"adapter={out / 'adapter'}", *paths, "top=1"]
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    below = predict(PredictConfig(adapter=str(out / "adapter"), images=[str(photos / "test")], top=2))
    assert list(below) == [str(path) for path in sorted((photos / "test").rglob("*.png"))]
    assert dict(below[paths[0]]) == pytest.approx(dict(found[paths[0]]), abs=1e-5)
    told = [path.encode(errors="backslashreplace").decode() for path in paths]
    wanted = [f"{name}: {found[p][0][0]} {found[p][0][1]:.1%}" for name, p in zip(told, paths, strict=True)]
    assert done.stdout.splitlines() == wanted


def test_a_recognizer_takes_pictures_of_any_mode_in_the_dtype_of_its_model(run, photos, tmp_path):
    recognizer = load_recognizer(run[0] / "adapter")
    picture = Image.open(photos / "test" / "red" / "0.png")
    odd = [picture.convert("RGBA"), picture.quantize(256), picture.convert("L"), picture.convert("CMYK")]
    for i, image in enumerate(odd):
        image.save(path := tmp_path / f"{i}.tiff")
        expected = predict(PredictConfig(adapter=str(run[0] / "adapter"), images=[str(path)], top=3))[str(path)]
        found = dict(zip(recognizer.classes, recognizer([image])[0].tolist(), strict=True))
        assert found == pytest.approx(dict(expected), abs=1e-5)
    whole = recognizer([picture])
    recognizer.model.double()
    assert torch.allclose(recognizer([picture]), whole, atol=1e-5)


def test_predictions_are_written_into_a_file_where_one_is_named(run, photos, tmp_path, capsys):
    pictures, adapter = [str(photos / "test")], str(run[0] / "adapter")
    found = predict(PredictConfig(adapter=adapter, images=pictures, top=2))
    for name in ("a.csv", "a.json"):
        tell(PredictConfig(adapter=adapter, images=pictures, top=2, out=str(tmp_path / name)), tmp_path)
        assert capsys.readouterr().out == f"15 pictures: {tmp_path / name}\n"
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = [(row["image"], row["class"], float(row["probability"])) for row in csv.DictReader(file)]
    assert rows == [(image, *one) for image, ranking in found.items() for one in ranking]
    written = json.loads((tmp_path / "a.json").read_text())
    assert {image: [(c["class"], c["probability"]) for c in ranking] for image, ranking in written.items()} == found
    tell(PredictConfig(adapter=adapter, images=pictures, top=2, out=str(tmp_path / "new" / "deep" / "a.csv")), tmp_path)
    assert (tmp_path / "new" / "deep" / "a.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"out=.*a\.csv is there already; choose another place"):
        tell(PredictConfig(adapter=adapter, images=pictures, out=str(tmp_path / "a.csv")), tmp_path)
    with pytest.raises(ConfigError, match=r"out=a\.txt: expected the name of a \.csv or a \.json file"):
        configure("predict", [f"adapter={adapter}", "images=[a]", "out=a.txt"])


def test_what_cant_be_read_in_a_folder_is_named_and_the_rest_predicted(run, photos, tmp_path, capsys):
    shutil.copyfile(photos / "test" / "red" / "0.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "lost.png").symlink_to("/nowhere.png")
    config = PredictConfig(adapter=str(run[0] / "adapter"), images=[str(tmp_path)])
    assert list(predict(config)) == [str(tmp_path / "good.png")]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert told == [
        f"left out: {tmp_path / 'bad.png'} is no image, or of an unknown kind",
        f"left out: {tmp_path / 'lost.png'} leads to /nowhere.png, which is missing",
    ]


def test_a_folder_without_a_picture_is_told_of_beside_others(run, photos, tmp_path):
    words = {"adapter": str(run[0] / "adapter"), "images": [str(photos / "test"), str(tmp_path)]}
    with pytest.raises(DataError, match=rf"^images={tmp_path} holds no picture \("):
        predict(PredictConfig(**words))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"^images={tmp_path} holds no usable picture; 1 were left out, .*bad\.png"):
        predict(PredictConfig(**words))


def test_pictures_are_found_from_the_home_folder(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(photos / "test" / "red" / "0.png", tmp_path / "a.png")
    adapter = str(run[0] / "adapter")
    assert list(predict(PredictConfig(adapter=adapter, images=["~/a.png"]))) == [str(tmp_path / "a.png")]
    assert evaluate(EvaluateConfig(adapter=[adapter], map_images=["~/a.png"], resamples=2))


def test_a_prediction_is_one_line_whatever_the_file_is_called(run, photos, tmp_path, capsys):
    shutil.copy(next((photos / "test").rglob("*.png")), tmp_path / "a\nb.png")
    tell(PredictConfig(adapter=str(run[0] / "adapter"), images=[str(tmp_path)], top=1), tmp_path)
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == [rf"{tmp_path}/a\nb.png"]


@pytest.mark.slow
def test_of_two_processes_one_tells_what_is_predicted(run, photos, two_processes, tmp_path):
    for i in range(3):
        shutil.copyfile(photos / "test" / "red" / "0.png", tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    command = [*two_processes, "-m", "vislora.predict", f"adapter={run[0] / 'adapter'}", str(tmp_path), "batch_size=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / f"{i}.png") for i in (0, 1, 2)
    ]
    assert done.stderr.count("left out: ") == 1


def test_base_weights_that_have_moved_are_asked_for_by_the_commands_own_key(run, tmp_path):
    shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "vislora.json").read_text())
    about["model"]["weights"] = str(tmp_path / "gone.safetensors")
    (tmp_path / "adapter" / "vislora.json").write_text(json.dumps(about))
    with pytest.raises(AdapterError, match=r"gone\.safetensors isn't there; give the right file with weights=FILE"):
        load_recognizer(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"typo\.safetensors isn't there; give the right file with weights=FILE"):
        load_recognizer(run[0] / "adapter", str(tmp_path / "typo.safetensors"))


def test_an_adapter_that_isnt_there_is_told_of_before_a_folder_is_looked_into(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"adapter=.*nowhere: there is no such file or folder"):
        predict(PredictConfig(adapter=str(tmp_path / "nowhere"), images=[str(tmp_path)]))
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:this CPU has no native bf16")
def test_predictions_are_computed_in_the_precision_that_is_asked_for(run, photos):
    out, _ = run
    path = str(photos / "test" / "green" / "1.png")
    settings = {"adapter": str(out / "adapter"), "images": [path], "top": 3}
    found = dict(predict(PredictConfig(**settings, precision=Precision.bf16))[path])
    mine = load_recognizer(out / "adapter")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lowered = mine.model(eval_transform(mine.preprocessing)(read_image(Path(path)))[None]).float().softmax(1)[0]
    assert [found[name] for name in CLASSES] == pytest.approx(lowered.tolist(), abs=2e-3)  # or a GPU's
    assert found != dict(predict(PredictConfig(**settings))[path])


def test_a_probe_and_full_fine_tuning_leave_a_timm_model(photos, weights, tmp_path):
    shared = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}"]
    base = load_file(weights)
    for adapter, changes in [("probe", False), ("full", True)]:
        result = train(configure("train", [*shared, f"adapter={adapter}", "trainer.epochs=2"]), tmp_path / adapter)
        model = timm.create_model(f"local-dir:{result.artifact}", pretrained=True)
        same = torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])
        assert same is not changes
        assert (result.trainable == result.parameters) is changes
        assert (tmp_path / adapter / "updates.json").is_file() is changes
        (again,) = evaluate(EvaluateConfig(adapter=[str(result.artifact)], precision=Precision.fp32))
        assert again.evaluation.top1 == result.test.top1
    image = str(photos / "test" / "red" / "0.png")
    with pytest.raises(ConfigError, match=r"weights=x are an adapter's base weights, and .* is a whole model"):
        predict(PredictConfig(adapter=str(result.artifact), images=[image], weights="x"))


@pytest.mark.parametrize(("words", "told"), [(["adapter=probe"], True), (["adapter=lora"], False)])
def test_a_rate_that_a_probe_has_no_use_for_is_told(words, told, photos, weights, tmp_path, capsys):
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", *words]
    train(
        configure("train", [*words, "trainer.stop_at=1", "optim.warmup=0", "optim.lr=0.5", "optim.head_lr=0.25"]),
        tmp_path / "run",
    )
    printed = capsys.readouterr().out
    assert ("a probe learns at optim.head_lr=0.25; optim.lr=0.5 has no effect" in printed) is told
    rates = {json.loads(line).get("lr") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()}
    assert (0.25 in rates) is told


def test_a_head_that_is_trained_already_may_stay(run, photos, weights, tmp_path):
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}"]
    words += [f"adapter.start={run[0] / 'adapter'}", "trainer.stop_at=1", "optim.head_lr=0"]
    result = train(configure("train", words), tmp_path / "run")
    before, after = (load_recognizer(folder).model.head.weight for folder in (run[0] / "adapter", result.artifact))
    assert torch.equal(before, after)


def test_denormals_count_as_zero_and_freed_memory_stays_in_training_alone(photos, weights, tmp_path):
    # a process of its own: what others left free in this one's memory would serve the block afterwards
    script = """import sys
from pathlib import Path
import torch
from pages import pages_of_a_block
from vislora.compose import configure
from vislora.objectives.recognition import Recognition
from vislora.train import train

def seen(block):
    print("seen", (torch.full((), 1e-39) * 1.0).item(), pages_of_a_block(block))

plain = Recognition.losses
Recognition.losses = lambda *a: (seen(2**24), plain(*a))[1]
folder, *words = sys.argv[1:]
train(configure("train", words), Path(folder))
seen(2**27)  # larger than what the blocks before have left
"""
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}"]
    said = in_its_own_process(script, str(tmp_path), *words, "trainer.epochs=1")
    *found, after = [line.split()[1:] for line in said.splitlines() if line.startswith("seen ")]
    assert len(found) == 3
    assert {float(number) for number, _ in found} == {0.0}
    assert float(after[0]) > 0.0
    if platform.libc_ver()[0] == "glibc":
        anew = int(after[1]) / 8  # a block eight times as large
        assert sum(int(pages) for _, pages in found) / len(found) < anew / 4


def test_a_training_goes_on_from_an_adapter(run, photos, weights, tmp_path, capsys):
    words = [*BASE, *TINY, *RUN, f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "optim.lr=0.0"]
    start = run[0] / "adapter"
    words += [f"adapter.start={start}", "trainer.epochs=1", "adapter.rank=3"]
    train(configure("train", words), tmp_path / "same")
    theirs, mine = read_peft(start), read_peft(tmp_path / "same" / "adapter")
    assert mine.equals(theirs)
    assert f"adapter.start={start}: layers, ranks and scales are its own, whatever" in capsys.readouterr().out

    turned = shutil.copytree(start, tmp_path / "turned")  # the same adapter, its classes in another order
    about = json.loads((turned / "vislora.json").read_text())
    (turned / "vislora.json").write_text(json.dumps(about | {"classes": about["classes"][1:] + about["classes"][:1]}))
    tensors = load_file(turned / "adapter_model.safetensors")
    heads = [key for key in tensors if re.search(r"\.head\.", key)]
    assert len(heads) == 2
    save_file(tensors | {key: tensors[key].roll(-1, 0) for key in heads}, turned / "adapter_model.safetensors")
    train(configure("train", [*words, f"adapter.start={turned}"]), tmp_path / "back")
    assert read_peft(tmp_path / "back" / "adapter").equals(theirs)
    assert "head begins anew" not in capsys.readouterr().out

    others = shutil.copytree(photos, tmp_path / "others")
    for split in ("train", "val", "test"):
        shutil.copytree(others / split / "red", others / split / "violet")
    train(configure("train", [*words, f"data.root={others}"]), tmp_path / "more")
    mine = read_peft(tmp_path / "more" / "adapter")
    assert replace(mine, trained={}).equals(replace(theirs, trained={}))
    assert mine.trained["head"]["weight"].shape == (4, 48)
    assert f"adapter.start={start} has other classes; the head begins anew" in capsys.readouterr().out

    save_file({key: 2 * value for key, value in load_file(weights).items()}, tmp_path / "else.safetensors")
    with pytest.raises(AdapterError, match=r"adapter\.start=.*was trained on base weights with SHA-256"):
        train(configure("train", [*words, f"model.weights={tmp_path / 'else.safetensors'}"]), tmp_path / "else")


def test_a_run_goes_on_only_with_the_weights_and_the_adapter_that_it_began_with(run, photos, weights, tmp_path):
    own, start = (
        shutil.copy(weights, tmp_path / "base.safetensors"),
        shutil.copytree(run[0] / "adapter", tmp_path / "start"),
    )
    words = [*BASE, *TINY, *RUN, f"model.weights={own}", "data=imagefolder", f"data.root={photos}", "trainer.epochs=1"]
    started = [*words, f"adapter.start={start}"]
    for name, given in {"fresh": words, "started": started}.items():
        train(configure("train", given), tmp_path / name)
        train(configure("train", [*given, f"trainer.resume={tmp_path / name}"]), tmp_path / name)
    save_file({key: 2 * value for key, value in load_file(weights).items()}, own)
    with pytest.raises(ConfigError, match=r"base weights was '.*' and is now '"):
        train(configure("train", [*words, f"trainer.resume={tmp_path / 'fresh'}"]), tmp_path / "fresh")
    shutil.copy(weights, own)
    settings = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 3}))
    with pytest.raises(ConfigError, match=r"adapter\.start \(what it holds\) was '.*' and is now '"):
        train(configure("train", [*started, f"trainer.resume={tmp_path / 'started'}"]), tmp_path / "started")


def test_a_run_goes_on_only_with_the_pictures_that_it_began_with(photos, tmp_path):
    mine = shutil.copytree(photos, tmp_path / "photos")
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={mine}", "trainer.epochs=1"]
    train(configure("train", words), tmp_path / "run")
    before = (tmp_path / "run" / "data.json").read_text()
    shutil.copy(mine / "train" / "red" / "0.png", mine / "train" / "blue" / "more.png")
    with pytest.raises(ConfigError, match=r"data \(its files, and their labels or captions\) was"):
        train(configure("train", [*words, f"trainer.resume={tmp_path / 'run'}"]), tmp_path / "run")
    assert (tmp_path / "run" / "data.json").read_text() == before


def test_a_run_goes_on_only_in_its_precision_from_wherever_its_folder_is_told(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}", "trainer.epochs=1"]
    train(configure("train", words), tmp_path / "run")
    resumed = configure("train", [*words, "trainer.precision=bf16"])
    resumed.trainer.resume = "~/run"  # as from a recipe, which no shell has seen
    with pytest.raises(ConfigError, match="precision was 'fp32' and is now 'bf16'"):
        train(resumed, tmp_path / "other")


def test_a_run_says_where_it_goes_on_and_which_step_it_exports(run, photos, tmp_path, capsys):
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}", "trainer.epochs=2"]
    words += ["optim.lr=1e-12", "optim.head_lr=1e-12"]  # so that no validation is better than the first
    train(configure("train", [*words, "trainer.keep=last"]), tmp_path / "run")
    steps = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"at step {steps // 2}; trainer.keep=last exports step {steps}\n" in capsys.readouterr().out
    train(configure("train", [*words, f"trainer.resume={tmp_path / 'run'}"]), tmp_path / "on")
    said = capsys.readouterr().out
    assert f"goes on after step {steps} of {tmp_path / 'run'}\n" in said
    assert f"at step {steps // 2}\n" in said
    began = r"and \d+ more; only with the same settings.*; it began as `python -m vislora\.train model=timm .*`$"
    with pytest.raises(ConfigError, match=began):
        train(configure("train", [f"trainer.resume={run[0]}"]), tmp_path / "other")


def test_patience_without_validation_and_another_runs_folder_are_refused(run, photos, tmp_path):
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos / 'train'}"]
    with pytest.raises(ConfigError, match=r"trainer\.patience=2 goes by validations, and there is nothing"):
        train(configure("train", [*words, "trainer.patience=2"]), tmp_path / "a")
    train(configure("train", [*words, "trainer.epochs=1"]), tmp_path / "b")
    with pytest.raises(ConfigError, match="holds a training or an evaluation already"):
        train(configure("train", [*words, "trainer.epochs=1", f"trainer.resume={tmp_path / 'b'}"]), run[0])


SEARCH = ["--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1"]


def search(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [*BASE, *TINY, *RUN, *SEARCH, "logger.trackers=[]", "hydra.sweep.dir=search", *words]
    command = [sys.executable, "-m", "vislora.train", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


def test_a_sweep_goes_on_after_settings_that_can_not_be_run(photos, weights, tmp_path):
    words = [f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "logger.trackers=[]"]
    words += ["trainer.epochs=1", "--multirun", "hydra.sweep.dir=sweep", "adapter.blocks=last:99,last:1"]
    command = [sys.executable, "-m", "vislora.train", *BASE, *TINY, *RUN, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(r"^vislora: \S+sweep/0: .*last:99", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    with (tmp_path / "sweep" / "results.csv").open(newline="") as table:
        assert [row["run"] for row in csv.DictReader(table)] == ["1"]


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(photos, weights, tmp_path):
    words = [f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "logger.trackers=[]"]
    command = [sys.executable, "-m", "vislora.train", *BASE, *TINY, *RUN, *words, "trainer.epochs=1"]
    now = {"cwd": tmp_path, "stdout": subprocess.DEVNULL}
    both = [subprocess.Popen([*command, f"seed={seed}"], **now) for seed in (0, 1)]
    assert [one.wait() for one in both] == [0, 0]
    assert len([*tmp_path.glob("runs/train/*/adapter")]) == 2


def test_a_sweep_leaves_a_table_of_its_runs(photos, weights, tmp_path):
    words = [f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "logger.trackers=[]"]
    command = [sys.executable, "-m", "vislora.train", *BASE, *TINY, *RUN, *words, "--multirun", "hydra.sweep.dir=sweep"]
    done = subprocess.run([*command, "optim.lr=1e-9,5e-3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sweep" / "results.csv").open(newline="") as table:
        first, second = csv.DictReader(table)
    assert "run 1: " in done.stdout
    assert done.stdout.count("the runs so far: sweep/results.csv\n") == 2
    for row, rate in ((first, 1e-9), (second, 5e-3)):
        assert float(row["settings"].rpartition("optim.lr=")[2]) == rate
        metrics = (tmp_path / "sweep" / row["run"] / "metrics.jsonl").read_text().splitlines()
        validated = [json.loads(line)["val_top1"] for line in metrics if "val_top1" in line]
        assert float(row["validation"]) == max(validated)


@pytest.mark.slow
def test_a_search_goes_by_the_best_validation_of_each_run(photos, weights, tmp_path):
    words = [f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "hydra.sweeper.direction=maximize"]
    grid = ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=2"]
    done = search(*words, *grid, "optim.lr=choice(1e-9,5e-3)", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    rows = [
        [json.loads(line) for line in (tmp_path / "search" / trial / "metrics.jsonl").read_text().splitlines()]
        for trial in ("0", "1")
    ]
    best = [max(row["val_top1"] for row in trial if "val_top1" in row) for trial in rows]
    assert best[0] != best[1]
    assert found["best_value"] == pytest.approx(max(best))
    assert float(found["best_params"]["optim.lr"]) == 5e-3


@pytest.mark.slow
def test_a_search_goes_on_after_settings_that_diverge(photos, weights, tmp_path):
    words = [f"model.weights={weights}", "data=imagefolder", f"data.root={photos}", "hydra.sweeper.direction=maximize"]
    words += ["hydra.sweeper.max_failure_rate=1", "optim.clip_norm=null", "trainer.epochs=1"]
    words += ["hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=4"]
    done = search(*words, "optim.lr=choice(1e30,5e-3)", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"vislora: \S+search/\d: .*loss", done.stderr)
    found = yaml.safe_load((tmp_path / "search" / "optimization_results.yaml").read_text())
    assert float(found["best_params"]["optim.lr"]) == 5e-3


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["hydra.sweeper.direction=minimize"], {}, "direction=minimize: to find the best settings and not the worst"),
        (["hydra.sweeper.direction=maximize"], {"WORLD_SIZE": "2"}, "every process would try settings of its own"),
        (["hydra.sweeper.direction=maximize"], {}, "a search goes by validations, and there is nothing to validate on"),
    ],
    ids=["direction", "processes", "validation"],
)
@pytest.mark.slow
def test_a_search_that_would_mislead_is_refused_before_it_trains(words, environment, message, photos, tmp_path):
    data = ["model.weights=random", "data=imagefolder", f"data.root={photos / 'train'}", "optim.lr=choice(1e-9,5e-3)"]
    done = search(*words, *data, folder=tmp_path, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_search_goes_the_way_of_the_figure():
    directions = [kind.direction for kind in _KINDS.values()]
    assert directions == ["maximize" if o.higher_is_better else "minimize" for o in (Recognition, Diffusion)]


def test_the_objective_and_the_augmentation_are_those_of_the_settings(photos, tmp_path):
    words = [
        *BASE,
        *TINY,
        *RUN,
        "model.weights=random",
        "data=imagefolder",
        f"data.root={photos}",
        "data.augment.hflip=0",
    ]
    accelerator = new_accelerator(Precision.fp32, cpu=True)

    def first_batch(*more):
        task = prepare(configure("train", [*words, *more]), Precision.fp32, accelerator, tmp_path)
        (images, labels), *_ = task.batches(0, 1)
        with torch.no_grad():
            return images, labels, task.model(images), task.objective.losses(task.model, (images, labels))

    plain, labels, logits, losses = first_batch("objective.label_smoothing=0.3")
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, 0.7 * entropy - 0.3 * logits.log_softmax(1).mean(1))
    torch.testing.assert_close(first_batch("data.augment.hflip=1")[0], plain.flip(-1))


def test_a_second_run_in_the_same_folder_is_refused(run):
    out, _ = run
    before = (out / "metrics.jsonl").read_text()
    refusal = r"holds a training or an evaluation already; choose another folder.*, or go on with trainer\.resume="
    with pytest.raises(ConfigError, match=refusal):
        train(configure("train", [*BASE, *TINY, *RUN]), out)
    assert (out / "metrics.jsonl").read_text() == before


def test_a_run_that_broke_off_before_its_first_checkpoint_is_not_said_to_go_on(tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds a training.*hydra\.run\.dir=FOLDER$"):
        train(configure("train", [*BASE, *TINY, *RUN]), tmp_path)


def test_an_adapter_finds_its_base_model_folder_from_anywhere(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(ExportConfig(adapter=str(run[0] / "adapter"), out="merged"))
    words = [*RUN, "model=timm", "model.name=local-dir:merged", "data=imagefolder", f"data.root={photos}"]
    words += ["trainer.epochs=1", "logger.trackers=[]"]
    adapter = train(configure("train", words), tmp_path / "run").artifact
    monkeypatch.chdir("/")
    assert load_recognizer(adapter).classes == CLASSES


@pytest.mark.parametrize("lr", [0, 1e-3])
def test_full_fine_tuning_tells_how_far_it_went_from_random_weights_too(photos, tmp_path, lr):
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}", "adapter=full"]
    train(configure("train", [*words, "trainer.epochs=1", f"optim.lr={lr}"]), tmp_path)
    updates = json.loads((tmp_path / "updates.json").read_text())
    assert {"patch_embed.proj", "blocks.1.mlp.fc2"} < {u["layer"] for u in updates}
    assert all((u["update"] > 0) is (lr > 0) and u["base"] > 0 for u in updates)


def test_an_adapter_on_random_weights_finds_them_again_by_its_seed(photos, tmp_path):
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}", "seed=5"]
    run = train(configure("train", [*words, "trainer.epochs=1", "logger.trackers=[]"]), tmp_path)
    again, probed = evaluate(configure("evaluate", [f"adapter={run.artifact}", "precision=fp32", "baselines=[probe]"]))
    torch.testing.assert_close(again.evaluation.predictions.logits, run.test.predictions.logits, rtol=0, atol=1e-5)
    assert probed.evaluation.count == 15
    about = json.loads((run.artifact / "vislora.json").read_text())
    for change, message in [
        ({"seed": 6}, "random has .*; open it with the torch and timm"),
        ({"weights_sha256": None}, "random base weights, which are gone with the run"),
    ]:
        (run.artifact / "vislora.json").write_text(json.dumps(about | change))
        with pytest.raises(AdapterError, match=message):
            load_recognizer(run.artifact)


def test_a_recognizers_folder_may_be_given_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AdapterError, match=re.escape(f"{tmp_path / 'nothing'} isn't there")):
        load_recognizer("~/nothing")


@pytest.mark.slow
def test_an_interrupted_training_says_how_to_go_on(photos, tmp_path):
    words = [*BASE, *TINY, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}"]
    words += ["trainer.epochs=100000", "trainer.checkpoint_every=1", f"hydra.run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "vislora.train", *words]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        while running.poll() is None and not any((tmp_path / "run" / "checkpoints").glob("step_*")):
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()  # it would go on for days where it ignores the signal, as below a shell's `&`
    assert running.returncode == 130
    assert said.splitlines()[-1] == f"vislora: stopped; the same command with trainer.resume={tmp_path / 'run'} goes on"
    assert "Traceback" not in said


def test_a_setting_of_the_model_that_is_unknown_is_named_by_every_command(run, tmp_path):
    shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "vislora.json"
    about = json.loads(file.read_text())
    about["model"]["colour"] = "blue"
    file.write_text(json.dumps(about))
    for opened in (load_recognizer, lambda folder: extract(ExtractConfig(tuned=str(folder), rank=2, out="out"))):
        with pytest.raises(AdapterError, match=r"vislora\.json: the model has the unknown key 'colour'; take it out"):
            opened(tmp_path / "adapter")


def test_an_adapter_on_other_base_weights_is_refused(run, weights, tmp_path):
    out, _ = run
    other = tmp_path / "other.safetensors"
    save_file({key: tensor + 0.01 for key, tensor in load_file(weights).items()}, other)
    with pytest.raises(AdapterError, match="was trained on base weights with SHA-256"):
        load_recognizer(out / "adapter", str(other))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    assert load_recognizer(out / "adapter", str(moved)).classes == CLASSES


def test_mistakes_of_evaluation_and_prediction_are_explained(run, photos, tmp_path):
    out, _ = run
    adapter = str(out / "adapter")
    with pytest.raises(AdapterError, match="nowhere isn't there"):
        load_recognizer(tmp_path / "nowhere")
    layers = {"unet.mid_block.attn.to_q": LowRankWeights(torch.randn(1, 8), torch.randn(8, 1), 1, 1.0, 8)}
    drawing = write_diffusers(Adapter(layers), tmp_path / "style")
    for given in (drawing, drawing.parent):
        with pytest.raises(AdapterError, match=r"recognises nothing; python -m vislora\.generate adapter=.*style"):
            load_recognizer(given)
    with pytest.raises(ConfigError, match="split=dev: expected train, val or test"):
        evaluate(EvaluateConfig(adapter=[adapter], split="dev"))
    for name in ("red", "violet"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(DataError, match="class 'violet' of the data is unknown to the adapter"):
        evaluate(EvaluateConfig(adapter=[adapter], data=ImageFolderData(root=str(tmp_path / "data")), split="train"))
    with pytest.raises(ConfigError, match=r"images=.*nothing\.jpg: there is no such file or folder"):
        predict(PredictConfig(adapter=adapter, images=[str(tmp_path / "nothing.jpg")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "timm has no model 'vit_tinny_patch16_224'; close: vit_tiny"),
        ({"name": "local-dir:/nowhere"}, r"config\.json is missing"),
        ({"name": "vit_tiny_patch16_224", "weights": "/nowhere.safetensors"}, "no such file"),
        ({"name": "vit_tiny_patch16_224", "weights": __file__}, r"only \.safetensors is read"),
        ({"name": "vit_tiny_patch16_224", "args": {"pretrained_cfg_overlay": 3}}, r"_overlay=3: expected a table"),
    ],
)
def test_models_that_can_not_be_built_are_explained(settings, message):
    with pytest.raises(ModelError, match=message):
        build_vit(ModelConfig(**settings), 3)


def test_weights_from_a_file_take_the_place_of_a_model_folders_own(run, tmp_path):
    folder = export(ExportConfig(adapter=str(run[0] / "adapter"), out=str(tmp_path / "merged")))
    theirs = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in theirs.items()}, tmp_path / "other.safetensors")
    model = build_vit(
        ModelConfig(name=f"local-dir:{folder}", weights=str(tmp_path / "other.safetensors")), len(CLASSES)
    )
    assert torch.equal(model.state_dict()["cls_token"], theirs["cls_token"] + 1)


def test_weights_of_another_architecture_are_refused(weights):
    message = r"another model's than vit_small_patch16_224's: \w+ is of shape \[1, 1, 48\] there, and \[1, 1, 384\]"
    with pytest.raises(ModelError, match=message):
        build_vit(ModelConfig("vit_small_patch16_224", str(weights), 32), 3)


def test_without_a_network_the_hub_is_answered_with_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"the hub can't be reached; give a file with model\.weights=FILE"):
        build_vit(ModelConfig("vit_tiny_patch16_224.augreg_in21k"), 3)


def test_original_dinov2_names_and_another_image_size_are_converted(tmp_path):
    """The weights as Meta names them (timm's own conversion), with positions for 70 px resampled to 42."""
    source = timm.create_model("vit_small_patch14_dinov2", img_size=70, depth=1, num_classes=0)
    state = source.state_dict() | {"mask_token": torch.zeros(1, 384)}  # only in the original files
    save_file(state, tmp_path / "original.safetensors")
    config = ModelConfig("vit_small_patch14_dinov2", str(tmp_path / "original.safetensors"), 42, args={"depth": 1})
    model = build_vit(config, 4)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape[1] == 10
    assert model(torch.randn(1, 3, 42, 42)).shape == (1, 4)
