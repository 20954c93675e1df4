"""Comparisons through the evaluate command: adapters, baselines and data sets in one table, the same from any number
of processes."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vislora.baselines import linear_probe
from vislora.blend import blend
from vislora.compose import configure
from vislora.config.commands import Corruption, PredictConfig
from vislora.config.data import ImageFolderData
from vislora.config.training import Precision
from vislora.data.images import read_image
from vislora.data.splits import ImageSplit, Pixels
from vislora.data.transforms import Preprocessing
from vislora.errors import AdapterError, ConfigError, DataError, ModelError
from vislora.evaluate import _load, _robustness, evaluate, short_names
from vislora.inference import Inference
from vislora.metrics.calibration import fit_temperature
from vislora.metrics.recognition import evaluate_predictions
from vislora.models.vit import build_vit
from vislora.precision import new_accelerator
from vislora.predict import predict
from vislora.recognizer import Recognizer, load_recognizer
from vislora.report.scores import scores_table, write_scores
from vislora.train import train

CLASSES = ("blue", "green", "red")
MODEL = ["model=timm", "model.name=vit_tiny_patch16_224", "model.img_size=32"]
MODEL += ["+model.args={patch_size:8,depth:2,embed_dim:48,num_heads:3}"]
RUN = ["trainer.epochs=3", "trainer.batch_size=10", "trainer.progress=false", "trainer.precision=fp32"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noisy pictures of three colours, 7 of each to test on."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "val": 5, "test": 7}.items():
        for k, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(90, 60, (40, 50, 3))
                pixels[..., k] += 12
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """A LoRA and a fully tuned model on the same base."""
    out = tmp_path_factory.mktemp("runs")
    config = configure("train", [*MODEL, "model.weights=random", "data=imagefolder", f"data.root={photos}"])
    torch.manual_seed(1)
    save_file(build_vit(config.model, 0).state_dict(), out / "base.safetensors")
    shared = [*MODEL, *RUN, f"model.weights={out / 'base.safetensors'}", "data=imagefolder", f"data.root={photos}"]
    for name, words in {"lora": ["optim.lr=5e-3"], "full": ["adapter=full", "optim.lr=1e-3"]}.items():
        train(configure("train", [*shared, *words, "logger.trackers=[]"]), out / name)
    return out


@pytest.fixture(scope="module")
def compared(runs, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    words = [f"adapter=[{runs / 'lora' / 'adapter'},{runs / 'full' / 'model'}]", "precision=fp32", "baselines=[probe]"]
    words += ["+data@sets.mine=imagefolder", f"sets.mine.root={photos}"]
    words += [
        "+data@sets.learned=imagefolder",
        f"sets.learned.root={photos / 'train'}",
        "sets.learned.val_fraction=0.5",
    ]
    words += ["corruptions=[brightness]", "resamples=100", "maps=2", "split=val"]
    return evaluate(configure("evaluate", words), out), out


def test_all_rows_are_in_one_table_and_each_has_its_folder(compared):
    rows, out = compared
    names = [(row.name, row.data) for row in rows]
    assert names == [
        (f"{adapter}{variant}", data)
        for adapter in ("lora", "full")
        for data in ("mine", "learned")
        for variant in ("", ", linear probe")
    ]
    table = json.loads((out / "scores.json").read_text())
    with (out / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for row, values, line in zip(rows, table, lines, strict=True):
        evaluation = json.loads((out / values["folder"] / "evaluation.json").read_text())
        assert evaluation["top1"] == values["top1"] == float(line["top1"]) == row.evaluation.top1
        low, high = values["intervals"]["top1"]
        assert low <= values["top1"] <= high
        assert (out / values["folder"] / "reliability.png").is_file()
    assert table[0]["differences"] is None
    assert table[4]["compared_with"] == "lora"
    assert table[4]["differences"]["top1"][0] == pytest.approx(table[4]["top1"] - table[0]["top1"])
    assert (out / "report.html").stat().st_size < 3e6
    words = (
        "lora, linear probe on mine",
        "Linear probes are fitted to the train split",
        "Robustness",
        "lora: what changed",
        "full: what changed",
    )
    for word in (*words, "95% intervals over images (Wilson"):  # of whichever split
        assert word in (out / "report.html").read_text()


def test_an_adapter_whose_folder_has_a_name_of_any_bytes_is_in_the_table(compared, tmp_path):
    rows, _ = compared
    write_scores([replace(rows[0], name="caf\udce9")], [], configure("evaluate", ["adapter=x"]), tmp_path)
    assert (tmp_path / "scores.csv").read_text().splitlines()[1].startswith(r"caf\udce9,mine,15,")


def test_probabilities_are_those_of_the_model_on_the_pictures_alone(compared, runs, photos):
    rows, _ = compared
    predictions = rows[0].evaluation.predictions
    recognizer = load_recognizer(runs / "lora" / "adapter")
    paths = sorted((photos / "val").rglob("*.png"))
    assert sorted(predictions.names) == [str(path) for path in paths]
    for path in paths[::4]:
        row = predictions.names.index(str(path))
        alone = recognizer([read_image(path)])[0]
        torch.testing.assert_close(predictions.probabilities()[row].float(), alone, atol=1e-5, rtol=0)
        assert CLASSES[predictions.labels[row]] == path.parent.name


def test_the_zero_adapter_is_the_base_model_and_leaves_the_adapter_as_it_was(runs):
    folder = str(runs / "lora" / "adapter")
    words = [f"adapter={folder}", "precision=fp32", "baselines=[zero]", "resamples=10"]
    adapted, zero = evaluate(configure("evaluate", words))
    recognizer = load_recognizer(folder)
    recognizer.adapters.scale("default", 0.0)
    image = read_image(Path(zero.evaluation.predictions.names[0]))
    torch.testing.assert_close(
        zero.evaluation.predictions.probabilities()[0].float(), recognizer([image])[0], atol=1e-5, rtol=0
    )
    assert not torch.allclose(zero.evaluation.predictions.logits, adapted.evaluation.predictions.logits, atol=1e-3)


def test_pictures_that_were_learned_are_told(compared, runs, photos, tmp_path, capsys):
    rows, out = compared
    count = rows[2].evaluation.count
    assert [row.learned for row in rows] == 2 * [0, None, count, None]
    told = f"lora learned {count} of the {count} images of learned, or copies of them: its figures"
    assert (out / "report.html").read_text().count(told) == 1

    for name in CLASSES:
        (tmp_path / "mixed" / "test" / name).mkdir(parents=True)
        for split in ("train", "test"):
            picture = read_image(photos / split / name / "3.png").resize((100, 80), Image.Resampling.BOX)
            picture.save(tmp_path / "mixed" / "test" / name / f"{split}.bmp")
    shutil.copytree(photos / "train", tmp_path / "mixed" / "train")
    words = [f"adapter={runs / 'lora' / 'adapter'}", "data=imagefolder", f"data.root={tmp_path / 'mixed'}"]
    (row,) = evaluate(configure("evaluate", words))
    assert row.learned == 3
    told = capsys.readouterr().out
    assert "learned 3 of the 6 pictures of imagefolder, or copies of them; its figures" in told
    assert f"new ones: {tmp_path / 'mixed' / 'test' / 'blue' / 'train.bmp'}, " in told

    moved = shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    about = json.loads((moved / "vislora.json").read_text())
    about["data"]["root"] = str(tmp_path / "gone")
    (moved / "vislora.json").write_text(json.dumps(about))
    (row,) = evaluate(configure("evaluate", [f"adapter={moved}", *words[1:]]))
    assert row.learned is None
    assert "learned" not in capsys.readouterr().out


def test_a_temperature_is_fitted_to_the_pictures_that_the_training_held_out(runs, photos, tmp_path, capsys):
    shared = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "data=imagefolder", "data.val_fraction=0.4"]
    words = [*shared, f"data.root={photos / 'train'}", "seed=3", "trainer.epochs=1", "logger.trackers=[]"]
    run = train(configure("train", words), tmp_path)
    words = [f"adapter={run.artifact}", "precision=fp32", "resamples=10"]
    (row,) = evaluate(configure("evaluate", [*words, "split=val"]))
    *_, told = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row.evaluation.calibration.nll == pytest.approx(told["val_loss"], rel=1e-5)
    (learned,) = evaluate(configure("evaluate", [*words, "split=train", "calibrate=true"]))
    assert "pictures are few to fit a temperature to; with it the calibration may be worse" in capsys.readouterr().out
    held_out = row.evaluation.predictions
    fitted = fit_temperature(held_out.logits, held_out.labels)
    assert learned.evaluation.calibrated.temperature == pytest.approx(fitted)
    again = [*words, "split=val", "data=imagefolder", f"data.root={photos / 'train'}", "data.val_fraction=0.4"]
    (given,) = evaluate(configure("evaluate", again))
    assert given.evaluation.predictions.names == row.evaluation.predictions.names


def test_mistakes_are_explained(runs, photos):
    lora = str(runs / "lora" / "adapter")
    with pytest.raises(ConfigError, match="is named twice"):
        evaluate(configure("evaluate", [f"adapter=[{lora},{lora}]"]))
    with pytest.raises(ConfigError, match=r"calibrate=true fits a temperature to split=val.*; give split=test"):
        configure("evaluate", [f"adapter={lora}", "calibrate=true", "split=val"])
    with pytest.raises(ConfigError, match=r"baselines=\[probe\] fits a linear probe to split=train.*; give split=val"):
        configure("evaluate", [f"adapter={lora}", "baselines=[probe]", "split=train"])
    with pytest.raises(ConfigError, match=r"unknown key sets\.mine\.rot"):
        configure("evaluate", [f"adapter={lora}", "+data@sets.mine=imagefolder", "sets.mine.rot=x"])
    with pytest.raises(ConfigError, match=r"sets\.mine\.root has no value"):
        configure("evaluate", [f"adapter={lora}", "+data@sets.mine=imagefolder"])
    config = configure(
        "evaluate", [f"adapter={lora}", "calibrate=true", "data=imagefolder", f"data.root={photos}/test"]
    )
    with pytest.raises(
        ConfigError, match=r"split=test: imagefolder has train; give split=train, or train with data\.val_"
    ):
        evaluate(config)
    config.split = "train"
    with pytest.raises(ConfigError, match="imagefolder has no validation split"):
        evaluate(config)


def test_a_class_that_the_last_adapter_doesnt_know_is_told_of_before_the_first_is_scored(runs, tmp_path, monkeypatch):
    other = shutil.copytree(runs / "lora" / "adapter", tmp_path / "other")
    about = json.loads((other / "vislora.json").read_text())
    (other / "vislora.json").write_text(json.dumps(about | {"classes": ["blue", "green", "violet"]}))
    monkeypatch.setattr(Inference, "outputs", lambda *_: pytest.fail("the first is scored"))
    with pytest.raises(DataError, match="class 'red' of the data is unknown to the adapter"):
        evaluate(configure("evaluate", [f"adapter=[{runs / 'lora' / 'adapter'},{other}]", "precision=fp32"]))


@pytest.mark.parametrize(("kind", "words"), [("lora/adapter", []), ("full/model", ["baselines=[probe]"])])
def test_base_weights_that_the_last_adapter_lacks_are_told_of_before_the_first_is_scored(
    kind, words, runs, tmp_path, monkeypatch
):
    other = shutil.copytree(runs / kind, tmp_path / "other")
    about = json.loads((other / "vislora.json").read_text())
    about["model"]["weights"] = str(tmp_path / "gone.safetensors")
    (other / "vislora.json").write_text(json.dumps(about))
    monkeypatch.setattr(Inference, "outputs", lambda *_: pytest.fail("the first is scored"))
    with pytest.raises(AdapterError, match=r"other needs its base weights, and .*gone\.safetensors isn't there"):
        evaluate(configure("evaluate", [f"adapter=[{runs / 'lora' / 'adapter'},{other}]", "precision=fp32", *words]))


def test_a_model_that_computes_no_numbers_is_told_of_before_any_figure(runs, photos, tmp_path):
    broken = shutil.copytree(runs / "full" / "model", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["head.bias"][1] = float("nan")
    save_file(weights, broken / "model.safetensors")
    message = "in fp32 the model computes no finite numbers of .*0.png, .* and 18 more; its weights may be broken"
    with pytest.raises(ModelError, match=message):
        evaluate(configure("evaluate", [f"adapter={broken}", "precision=fp32"]))
    with pytest.raises(ModelError, match=r"no finite numbers of .*red.* and 4 more"):
        predict(PredictConfig(adapter=str(broken), images=[str(photos / "test" / "red")]))


def test_pictures_of_a_single_class_are_scored_but_fit_no_probe(runs, photos, tmp_path):
    shutil.copytree(photos / "test" / "red", tmp_path / "mine" / "red")
    words = [f"adapter={runs / 'lora' / 'adapter'}", "data=imagefolder", f"data.root={tmp_path / 'mine'}"]
    words += ["split=train", "precision=fp32", "resamples=50"]
    (row,) = evaluate(configure("evaluate", words), tmp_path / "out")
    (whole,) = evaluate(configure("evaluate", [*words, f"data.root={photos / 'test'}"]), tmp_path / "whole")
    red = whole.evaluation.predictions.classes.index("red")
    assert row.evaluation.top1 == pytest.approx(whole.evaluation.recall[red].item())
    with pytest.raises(ConfigError, match=r"baselines=\[probe\]: .* has 'red' alone, and a probe tells classes apart"):
        evaluate(configure("evaluate", [*words, "split=val", "data.val_fraction=0.3", "baselines=[probe]"]))


def test_a_picture_to_map_that_isnt_there_is_told_of_before_anything_is_scored(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("vislora.inference.Inference.outputs", lambda *_: pytest.fail("scored"))
    words = [f"adapter={runs / 'lora' / 'adapter'}", "map_images=[nowhere.jpg]"]
    with pytest.raises(DataError, match=r"nowhere\.jpg is missing"):
        evaluate(configure("evaluate", words), tmp_path / "out")


def test_data_of_the_training_that_have_moved_are_asked_for(runs, tmp_path):
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "vislora.json").read_text())
    about["data"]["root"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "vislora.json").write_text(json.dumps(about))
    message = r"gone, on which .*adapter was trained, isn't there; give data=imagefolder data\.root=FOLDER, or"
    with pytest.raises(ConfigError, match=message):
        evaluate(configure("evaluate", [f"adapter={tmp_path / 'adapter'}"]))


def test_adapters_of_one_base_share_a_probe_and_others_dont(runs, photos, tmp_path, monkeypatch):
    shared = [*MODEL, *RUN, "model.weights=random", "data=imagefolder", f"data.root={photos}", "trainer.epochs=1"]
    other = train(configure("train", [*shared, "logger.trackers=[]"]), tmp_path / "other").artifact
    folders = [runs / "lora" / "adapter", runs / "full" / "model", other]
    fitted = []
    monkeypatch.setattr("vislora.baselines.linear_probe", lambda *given: fitted.append(1) or linear_probe(*given))
    words = [f"adapter=[{','.join(map(str, folders))}]", "baselines=[probe]", "resamples=10", "precision=fp32"]
    _, first, _, second, _, third = (
        row.evaluation.predictions.logits for row in evaluate(configure("evaluate", words))
    )
    assert len(fitted) == 2
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_model_without_an_adapter_to_take_out_is_told_of_before_anything_is_scored(runs, monkeypatch):
    monkeypatch.setattr("vislora.inference.Inference.outputs", lambda *_: pytest.fail("scored"))
    lora, full = runs / "lora" / "adapter", runs / "full" / "model"
    with pytest.raises(AdapterError, match=r"full/model is a fully tuned or merged model and has none; leave it out"):
        evaluate(configure("evaluate", [f"adapter=[{lora},{full}]", "baselines=[zero]"]))


def test_a_folder_that_holds_a_run_or_an_evaluation_is_left_as_it_is(compared, runs):
    config = configure("evaluate", [f"adapter={runs / 'lora' / 'adapter'}", "resamples=10"])
    for folder in (compared[1], runs / "lora"):
        before = (folder / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="holds a training or an evaluation already; choose another folder"):
            evaluate(config, folder)
        with pytest.raises(ConfigError, match="holds a training or an evaluation already; choose another folder"):
            train(configure("train", ["recipe=vit_birds"]), folder)
        assert (folder / "config.yaml").read_text() == before


def test_adapters_are_named_by_what_tells_them_apart():
    assert short_names(["runs/a/adapter"]) == ["a"]
    assert short_names(["runs/a/adapter", "runs/b/model", "c"]) == ["a", "b", "c"]
    assert short_names(["x/1/adapter", "y/1/adapter"]) == ["x/1", "y/1"]
    assert short_names(["/1/adapter", "/x/1/adapter"]) == ["/1", "x/1"]


def test_data_sets_of_one_name_are_told_apart_by_what_they_differ_in(runs, photos, tmp_path):
    others = {}
    for name, changed in {"moved": {"root": str(tmp_path / photos.name)}, "less": {"val_fraction": 0.5}}.items():
        others[name] = shutil.copytree(runs / "lora" / "adapter", tmp_path / name / "adapter")
        about = json.loads((others[name] / "vislora.json").read_text())
        about["data"] |= changed
        (others[name] / "vislora.json").write_text(json.dumps(about))
    shutil.copytree(photos, tmp_path / photos.name)
    own = runs / "lora" / "adapter"

    def titles(*adapters):
        words = [f"adapter=[{','.join(map(str, adapters))}]", "precision=fp32", "resamples=10"]
        return [row.data for row in evaluate(configure("evaluate", words))]

    assert titles(own, runs / "full" / "model") == ["imagefolder"] * 2
    mine, moved = (f"imagefolder, root={folder.name}/{photos.name}" for folder in (photos.parent, tmp_path))
    assert titles(own, runs / "full" / "model", others["moved"]) == [mine, mine, moved]
    assert titles(own, others["less"]) == ["imagefolder, val_fraction=0.0", "imagefolder, val_fraction=0.5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=imagefolder", "data.root=x", "data.crop_pct=0.5"], r"data\.crop_pct is for training; .* leave it out"),
        (["data=imagefolder", "data.root=x", "data.augment.rotate=9"], r"data\.augment is for training"),
        (["+data@sets.x=birds", "sets.x.crop_pct=0.5"], r"sets\.x\.crop_pct is for training"),
        (["weights=x.safetensors"], r"weights=x\.safetensors are an adapter's .*full/model is a whole model"),
    ],
)
def test_what_an_evaluation_would_make_no_use_of_is_refused(words, message, runs):
    with pytest.raises(ConfigError, match=message):
        evaluate(configure("evaluate", [f"adapter={runs / 'full' / 'model'}", *words]))


def test_base_weights_may_be_given_where_one_of_several_is_an_adapter(runs):
    words = [f"adapter=[{runs / 'full' / 'model'},{runs / 'lora' / 'adapter'}]", "precision=fp32", "resamples=10"]
    assert len(evaluate(configure("evaluate", [*words, f"weights={runs / 'base.safetensors'}"]))) == 2


@pytest.mark.slow
def test_two_processes_give_the_very_same_numbers_as_one(runs, photos, two_processes, tmp_path):
    words = ["-m", "vislora.evaluate", f"adapter={runs / 'lora' / 'adapter'}", "baselines=[probe]", "batch_size=4"]
    words += ["corruptions=[noise]", "precision=fp32"]  # 21 images: 6 batches, the last of one
    found = []
    for name, launch in {"one": [sys.executable], "two": two_processes}.items():
        command = [*launch, *words, f"hydra.run.dir={tmp_path / name}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / name / "scores.json").read_text())
        for row in rows:
            del row["images_per_s"]
            row["predictions"] = (tmp_path / name / row["folder"] / "predictions.csv").read_text()
        found.append(rows)
    assert [row["images"] for row in found[0]] == [21, 21]
    assert found[0] == found[1]


def test_what_was_held_out_of_a_folder_that_has_grown_is_refused(photos, runs, tmp_path):
    root = tmp_path / "grown"
    shutil.copytree(photos / "train", root)
    words = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "data=imagefolder", f"data.root={root}"]
    words += ["data.val_fraction=0.4", "trainer.epochs=1", "logger.trackers=[]"]
    adapter = train(configure("train", words), tmp_path / "run").artifact
    held_out = configure("evaluate", [f"adapter={adapter}", "split=val", "precision=fp32", "resamples=10"])
    assert evaluate(held_out)[0].evaluation.count == 9
    own = [f"adapter={adapter}", "split=val", "precision=fp32", "data=imagefolder", f"data.root={root}"]
    refusal = r"have changed since .* held out now it learned in part"
    with pytest.raises(ConfigError, match=refusal):  # of which some were trained on
        evaluate(configure("evaluate", [*own, "data.val_fraction=0.6"]))
    red = {i: (root / "red" / f"{i}.png").read_bytes() for i in range(8)}
    for i, picture in red.items():  # other pictures under the same names
        (root / "red" / f"{(i + 1) % 8}.png").write_bytes(picture)
    with pytest.raises(ConfigError, match=refusal):
        evaluate(held_out)
    for i, picture in red.items():
        (root / "red" / f"{i}.png").write_bytes(picture)
    assert evaluate(configure("evaluate", [*own, "data.val_fraction=0.4"]))[0].evaluation.count == 9
    shutil.copyfile(root / "red" / "0.png", root / "red" / "00.png")
    for config in (held_out, replace(held_out, split="train", calibrate=True)):
        with pytest.raises(ConfigError, match=refusal):
            evaluate(config)


def test_nothing_is_held_out_of_what_was_learned_as_a_whole(photos, runs, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos", ignore=lambda folder, names: {"val"} & {*names})
    words = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "data=imagefolder", f"data.root={root}"]
    adapter = train(configure("train", [*words, "trainer.epochs=1", "logger.trackers=[]"]), tmp_path / "run").artifact
    own = [f"adapter={adapter}", "precision=fp32", "resamples=10"]
    with pytest.raises(ConfigError, match=r"no validation split; train with data\.val_fraction, or give pictures"):
        evaluate(configure("evaluate", [*own, "calibrate=true"]))
    again = [*own, "data=imagefolder", f"data.root={root}", "data.val_fraction=0.5"]
    for more in ("calibrate=true", "split=val"):
        with pytest.raises(ConfigError, match=r"learned all pictures of train, and those that data\.val_fraction"):
            evaluate(configure("evaluate", [*again, more]))
    assert evaluate(configure("evaluate", again))[0].evaluation.count == 21
    others = [*own, "data=imagefolder", f"data.root={photos / 'test'}", "data.val_fraction=0.4"]
    assert evaluate(configure("evaluate", [*others, "split=val"]))[0].evaluation.count == 9


def test_data_of_the_training_are_known_by_whatever_path_leads_to_them(photos, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(photos / "train")
    base = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "logger.trackers=[]", "trainer.epochs=1"]
    data = ["data=imagefolder", f"data.root={photos / 'train'}"]
    partly = train(configure("train", [*base, *data, "data.val_fraction=0.25"]), tmp_path / "partly").artifact
    wholly = train(configure("train", [*base, *data, "data.val_fraction=0"]), tmp_path / "wholly").artifact
    for path in (f"{photos.name}/train", f"{tmp_path}/elsewhere/../link", f"{photos}/test/../train"):
        words = ["data=imagefolder", f"data.root={path}", "data.val_fraction=0.25", "split=val", "precision=fp32"]
        (row,) = evaluate(configure("evaluate", [f"adapter={partly}", *words]))
        assert (row.evaluation.count, row.learned) == (6, 0)
        with pytest.raises(ConfigError, match="learned all pictures of train"):
            evaluate(configure("evaluate", [f"adapter={wholly}", *words]))


def test_pictures_that_an_adapter_to_go_on_from_learned_are_not_held_out(photos, runs, tmp_path, capsys):
    base = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "logger.trackers=[]", "trainer.epochs=1"]
    base += ["data=imagefolder", f"data.root={photos / 'train'}"]
    for name, first, told in (("other", "0.5", True), ("same", "0.25", False)):
        begun = train(configure("train", [*base, f"data.val_fraction={first}"]), tmp_path / name).artifact
        words = [*base, "data.val_fraction=0.25", f"adapter.start={begun}"]
        gone_on = train(configure("train", words), tmp_path / f"{name}_on").artifact
        assert (f"adapter.start={begun} learned pictures of these data that" in capsys.readouterr().out) is told
        validated = configure("evaluate", [f"adapter={gone_on}", "split=val", "precision=fp32"])
        if told:
            with pytest.raises(ConfigError, match="learned all pictures of train, and those that"):
                evaluate(validated)
        else:
            assert evaluate(validated)[0].evaluation.count == 6


def test_what_every_training_behind_an_adapter_learned_is_told(photos, runs, tmp_path):
    base = [*MODEL, *RUN, f"model.weights={runs / 'base.safetensors'}", "logger.trackers=[]", "trainer.epochs=1"]
    first = runs / "lora" / "adapter"  # of photos / "train"
    words = [*base, "data=imagefolder", f"data.root={photos / 'test'}"]
    other = train(configure("train", words), tmp_path / "other").artifact
    gone_on = train(configure("train", [*words, f"adapter.start={first}"]), tmp_path / "on").artifact
    for i, adapters in enumerate(([other, first], [other, gone_on])):
        both = f"adapter=[{adapters[0]},{adapters[1]}]"
        blend(configure("blend", [both, "weights=[1,1]", "head=0", f"out={tmp_path / str(i)}"]))
    scored = ["precision=fp32", "resamples=10", "data=imagefolder", f"data.root={photos}"]
    for adapter, count in ((other, 0), (gone_on, 24), (tmp_path / "0", 24), (tmp_path / "1", 24)):
        (row,) = evaluate(configure("evaluate", [f"adapter={adapter}", *scored, "split=train"]))
        assert row.learned == count

    about = json.loads((tmp_path / "0" / "vislora.json").read_text())
    gone = {"data": {"option": "imagefolder", "root": str(tmp_path / "gone")}}
    for told, count in (
        ([gone, about["trainings"][0]], None),  # of what isn't there it can't be told, and the other's are others
        ([gone, *about["trainings"]], 24),
        ([{"data": {"option": "captions", "root": str(tmp_path)}}], None),
        ([{"data": {"option": "imagefolder", "root": 5000 * "a"}}], None),
        (["x", {"data": 3}], None),
        (None, 0),  # as of one that was neither blended nor trained further
    ):
        (tmp_path / "0" / "vislora.json").write_text(json.dumps(about | {"trainings": told}))
        (row,) = evaluate(configure("evaluate", [f"adapter={tmp_path / '0'}", *scored, "split=train"]))
        assert row.learned == count


def test_data_of_one_name_are_those_of_their_settings_and_divided_by_their_seed(photos):
    accelerator, loaded = new_accelerator(Precision.fp32, cpu=True), {}
    whole, part = (ImageFolderData(root=str(root), val_fraction=0.4) for root in (photos / "train", photos / "test"))
    first, other, again = (_load(data, 0, loaded, accelerator) for data in (whole, part, whole))
    assert first is again
    assert not {*first.val.names} & {*other.val.names}
    assert _load(whole, 1, loaded, accelerator).val.names != first.val.names


class Edge(nn.Module):
    """Whether a picture's first row is dark or light."""

    def forward(self, images):
        row = images[:, :, 0].mean((1, 2))
        return torch.stack([-row, row], 1)


def test_pictures_are_cropped_once_before_they_are_spoiled():
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    pixels[:, 16:48, 16:48], pixels[:, 20:44, 20:44] = 255, 0  # a light frame at the edge of the middle half
    split = ImageSplit(("dark", "light"), [1, 1], ["x", "y"], Pixels(pixels))
    cropped = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, crop_pct=0.5)
    inference = Inference(2, Precision.fp32, 0, new_accelerator(Precision.fp32, cpu=True))
    recognizer = Recognizer(Edge(), cropped, split.classes, {})
    assert _robustness(recognizer, split, [Corruption.jpeg], inference) == {Corruption.jpeg: [1.0] * 5}


def test_rows_of_the_same_pictures_with_other_labels_are_not_compared(compared, tmp_path):
    rows, _ = compared
    one = rows[0]
    predictions = one.evaluation.predictions
    swapped = replace(predictions, labels=(predictions.labels + 1) % len(CLASSES))
    config = configure("evaluate", ["adapter=[a,b]", "resamples=10"])
    for other in (
        replace(one, evaluation=replace(one.evaluation, predictions=swapped)),
        replace(one, pictures={"style": "ink"}),
        one,
    ):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        write_scores([one, replace(other, name="other")], [], config, folder)
        table = json.loads((folder / "scores.json").read_text())
        assert (table[1]["differences"] is None) == (other is not one)


def test_calibration_is_in_the_tables(compared, tmp_path):
    one = compared[0][0]
    plain = replace(one, name="plain")
    fitted = evaluate_predictions(one.evaluation.predictions, temperature=1.7, resamples=10)
    text = scores_table([replace(one, evaluation=fitted), plain]).splitlines()
    assert text[0].index("calibrated (T)") + len("calibrated (T)") == text[1].index("(1.70)") + len("(1.70)")
    assert "(1.70)" not in text[2]
    write_scores([replace(one, evaluation=fitted), plain], [], configure("evaluate", ["adapter=[a]"]), tmp_path)
    with open(tmp_path / "scores.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["temperature"]) == 1.7
    assert float(first["calibrated_ece"]) == pytest.approx(fitted.calibrated.ece)
    assert second["temperature"] == second["calibrated_nll"] == ""
