"""A folder with every fault: each is found with its file named, clean drawings raise no alarm, and the list it writes
makes the next preflight, and the training, come out clean."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vislora.compose import configure
from vislora.config.data import ImageFolderData
from vislora.data.birds import SPECIES, picture
from vislora.data.findings import Level, Row
from vislora.data.load import load_splits
from vislora.data.preflight import look_through
from vislora.errors import DataError
from vislora.preflight import preflight
from vislora.report.preflight import headline, summary

NAMES = ("barn owl", "blue jay", "mallard")
EACH = {"train": 12, "val": 3, "test": 4}


def drawing(name, seed):
    return picture(SPECIES[name], seed, 0.1, "natural", 96)


def clean_birds(root):
    for k, (split, count) in enumerate(EACH.items()):
        for name in NAMES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                drawing(name, 1000 * k + i).save(folder / f"{i}.jpg", quality=92)


def run(*words):
    return preflight(configure("preflight", words))


def found(result, kind):
    """The names, relative to the last folder called `birds`, of a kind of finding."""
    items = [item for finding in result.findings if finding.kind == kind for item in finding.items]
    return {item.name.split("/birds/")[-1] for item in items}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "birds"
    clean_birds(root)
    return root


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One file for each fault."""
    root = tmp_path_factory.mktemp("planted") / "birds"
    clean_birds(root)
    owl, jay, duck = (root / "train" / name for name in NAMES)
    (jay / "truncated.jpg").write_bytes((jay / "0.jpg").read_bytes()[:1500])
    drawing("mallard", 50).save(duck / "whole.png")
    (duck / "truncated.png").write_bytes((duck / "whole.png").read_bytes()[:-3000])
    (duck / "whole.png").unlink()
    (duck / "empty.jpg").write_bytes(b"")
    (duck / "text.jpg").write_text("no picture")
    bomb(owl / "bomb.png")
    drawing("mallard", 51).save(duck / "really_png.jpg", "PNG")
    drawing("mallard", 52).convert("CMYK").save(duck / "cmyk.jpg")
    grey = np.asarray(drawing("mallard", 53).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(duck / "deep.png")
    palette = drawing("mallard", 54).quantize(64)
    palette.save(duck / "palette.png", transparency=0)
    for kind, seed in {"gif": 55, "webp": 58}.items():
        frames = [drawing("barn owl", seed + i) for i in range(3)]
        frames[0].save(owl / f"animated.{kind}", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing("barn owl", 62).save(owl / "rotated.jpg", exif=exif)
    copy(owl / "1.jpg", owl / "resized.jpg", scale=0.7)
    copy(owl / "2.jpg", owl / "recompressed.jpg", quality=40)
    copy(root / "test/barn owl/3.jpg", owl / "leaked.jpg", scale=1.5)
    copy(root / "val/mallard/1.jpg", root / "test/mallard/leaked.png")
    copy(duck / "7.jpg", owl / "mislabelled.jpg", quality=80)
    for name, seed in {"blue_jay": 63, "Malard": 64, "barn owl ": 65}.items():
        (root / "train" / name).mkdir()
        drawing("mallard", seed).save(root / "train" / name / "typo.jpg")
    return root


def copy(source, target, scale=1.0, quality=85):
    with Image.open(source) as image:
        size = [round(side * scale) for side in image.size]
        image.resize(size, Image.Resampling.BICUBIC).save(target, quality=quality)


def bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.fixture(scope="module")
def result(planted):
    return run("data=imagefolder", f"data.root={planted}")


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("damaged", {"train/blue jay/truncated.jpg", "train/mallard/truncated.png"}),
        ("empty", {"train/mallard/empty.jpg"}),
        ("unknown", {"train/mallard/text.jpg"}),
        ("huge", {"train/barn owl/bomb.png"}),
        ("suffix", {"train/mallard/really_png.jpg"}),
        ("colours", {"train/mallard/cmyk.jpg"}),
        ("deep", {"train/mallard/deep.png"}),
        ("transparent", {"train/mallard/palette.png"}),
        ("animated", {"train/barn owl/animated.gif", "train/barn owl/animated.webp"}),
        ("rotated", {"train/barn owl/rotated.jpg"}),
        ("copies", {"train/barn owl/resized.jpg", "train/barn owl/2.jpg"}),
        ("leak", {"train/barn owl/leaked.jpg", "val/mallard/1.jpg"}),
        ("conflict", {"train/mallard/7.jpg"}),
        ("misspelled", {"train/blue_jay/typo.jpg", "train/Malard/typo.jpg", "train/barn owl /typo.jpg"}),
        ("few", {"blue_jay", "Malard", "barn owl "}),
        ("absent", {"blue_jay", "Malard", "barn owl "}),
    ],
)
def test_each_planted_fault_is_found_and_nothing_else(result, kind, files):
    if kind == "copies":  # of two equally large copies either may stay
        files = {name for name in files if "2.jpg" not in name} | (
            found(result, kind) & {"train/barn owl/2.jpg", "train/barn owl/recompressed.jpg"}
        )
        assert len(files) == 2
    assert found(result, kind) == files


def test_no_other_kind_of_fault_is_claimed(result):
    assert result.usable
    kinds = {finding.kind for finding in result.findings}
    assert kinds == {
        "damaged", "empty", "unknown", "huge", "suffix", "colours", "deep", "transparent", "animated", "rotated",
        "copies", "leak", "conflict", "misspelled", "few", "uneven", "absent",
    } - ({"uneven"} - kinds)  # fmt: skip
    levels = [list(Level).index(finding.level) for finding in result.findings]
    assert levels == sorted(levels)


def test_clean_drawings_raise_no_alarm(clean):
    result = run("data=imagefolder", f"data.root={clean}")
    assert result.findings == ()
    assert result.leave_out == {}
    assert result.pictures == {"train": 36, "val": 9, "test": 12}
    assert result.classes["mallard"] == EACH
    assert headline(result) is None
    assert summary(result, clean, None).endswith("nothing: train")


def test_the_command_writes_a_list_with_which_everything_is_clean(planted, tmp_path):
    def command(*more):
        words = ["data=imagefolder", f"data.root={planted}", f"hydra.run.dir={tmp_path / 'out'}", *more]
        return subprocess.run([sys.executable, "-m", "vislora.preflight", *words], capture_output=True, text=True)

    done = command()
    assert done.returncode == 0, done.stderr
    assert "train/blue jay/truncated.jpg  can't be decoded" in done.stdout
    assert f"train with data.quarantine={tmp_path / 'out' / 'quarantine.txt'}" in done.stdout.split("What to do")[1]
    written = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert written["usable"]
    assert {finding["kind"] for finding in written["findings"]} >= {"damaged", "leak", "misspelled"}
    listed = [
        line for line in (tmp_path / "out" / "quarantine.txt").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert len(listed) == 5 + 2 + 2 + 2  # unusable, copies, leaks, and both of the conflict
    quarantine = tmp_path / "out" / "quarantine.txt"
    clean = run("data=imagefolder", f"data.root={planted}", f"data.quarantine={quarantine}")
    assert not {finding.kind for finding in clean.findings} & {"damaged", "empty", "huge", "copies", "leak", "conflict"}
    assert len(found(clean, "quarantined")) == 11
    assert clean.leave_out == {}
    splits = load_splits(ImageFolderData(root=str(planted), quarantine=str(quarantine)), 0)
    assert not {f"{planted}/{name}" for name in listed} & {*splits.train.names, *splits.val.names, *splits.test.names}


def test_the_next_list_holds_what_the_one_before_left_out(planted, tmp_path):
    (tmp_path / "list.txt").write_text("train/mallard/empty.jpg\ntrain/mallard/3.jpg\ntrain/mallard/gone.jpg\n")
    result = run("data=imagefolder", f"data.root={planted}", f"data.quarantine={tmp_path / 'list.txt'}")
    listed = {name.split("/birds/")[-1] for name in result.leave_out}
    assert listed >= {"train/mallard/empty.jpg", "train/mallard/3.jpg", "train/mallard/text.jpg"}
    assert "train/mallard/gone.jpg" not in listed


def test_the_next_list_holds_it_too_where_the_data_can_not_be_loaded(tmp_path):
    for folder in ("train/mallard", "train/barn owl", "val/swan"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            drawing(NAMES[2], i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "list.txt").write_text("train/mallard/0.png\n")
    (tmp_path / "train" / "mallard" / "empty.png").touch()
    words = ["data=imagefolder", f"data.root={tmp_path}", f"data.quarantine={tmp_path / 'list.txt'}"]
    result = run(*words)
    assert "'swan' is unknown to train" in result.error
    assert result.pictures == {"train": 3, "val": 2}
    assert result.leave_out[f"{tmp_path}/train/mallard/0.png"] == "left out already"
    (tmp_path / "list.txt").write_text("train/nothing\n")
    assert run(*words).pictures == {"train": 4, "val": 2}


def test_data_that_can_not_be_trained_on_is_reported_all_the_same_with_exit_code_2(clean, tmp_path):
    root = tmp_path / "birds"
    for path in clean.rglob("*.jpg"):
        target = root / path.relative_to(clean)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    (root / "val" / "mallard").rename(root / "val" / "Mallard_")
    result = run("data=imagefolder", f"data.root={root}")
    assert not result.usable
    assert "'Mallard_' is unknown to train" in result.error
    assert found(result, "misspelled") == {f"val/Mallard_/{i}.jpg" for i in range(3)}
    command = [sys.executable, "-m", "vislora.preflight", "data=imagefolder", f"data.root={root}"]
    done = subprocess.run([*command, f"hydra.run.dir={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "misspelled" in done.stdout
    assert "is unknown to train" in done.stderr
    assert not json.loads((tmp_path / "out" / "preflight.json").read_text())["usable"]
    with pytest.raises(DataError, match="there is no such folder"):
        run("data=imagefolder", f"data.root={root / 'nowhere'}")


def test_pictures_held_out_are_compared_with_those_they_were_taken_from(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        for i in range(5):
            drawing(name, i).save(tmp_path / name / f"{i}.png")
            copy(tmp_path / name / f"{i}.png", tmp_path / name / f"{i}_again.jpg")
    result = run("data=imagefolder", f"data.root={tmp_path}", "data.val_fraction=0.3")
    leaks = found(result, "leak")
    assert leaks
    assert len(leaks) + len(found(result, "copies")) == 15
    quarantine = [Path(name) for name in result.leave_out]
    kept = {path.name.replace("_again.jpg", ".png") for path in tmp_path.rglob("*.*") if path not in quarantine}
    assert len(quarantine) == 15
    assert len(kept) == 5  # one of each stays


def test_a_picture_with_two_captions_isnt_left_out_as_its_own_copy(tmp_path):
    drawing(NAMES[0], 0).save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": text} for text in ("one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("model=diffusers", "model.name=x", "data=captions", f"data.root={tmp_path}", "data.size=64")
    assert [item.what for finding in result.findings for item in finding.items] == ["is listed twice"]
    assert result.leave_out == {}


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_told_in_one_sentence(clean, tmp_path):
    resource = pytest.importorskip("resource")  # Windows has none
    limit = (64, 64)  # bytes of a file
    words = ["data=imagefolder", f"data.root={clean}", f"hydra.run.dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "vislora.preflight", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"VISLORA_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert done.returncode == 2
    told = rf"vislora: {tmp_path}/cache/inspected/\w+\.jsonl can't be used: File too large; VISLORA_CACHE=FOLDER .*\n"
    assert re.fullmatch(told, done.stderr)


def test_pictures_smaller_than_the_models_input_are_counted(clean):
    model = ["model=timm", "model.name=vit_tiny_patch16_224", "model.weights=random"]
    result = run("data=imagefolder", f"data.root={clean}", *model)
    assert (result.sizes.smallest, result.sizes.largest, result.input_size) == (96, 96, 224)
    (finding,) = result.findings
    assert finding.kind == "upscaled"
    assert "224 pixels, hence upscaled: 100%" in finding.what
    assert run("data=imagefolder", f"data.root={clean}", *model, "model.img_size=96").findings == ()


def test_drawn_birds_and_tables_are_looked_through_too(clean):
    species = "data.species=[mallard,barn owl]"
    drawn = run(species, "data.train_per_species=5", "data.val_per_species=0", "data.test_per_species=5")
    assert drawn.findings == ()
    assert drawn.sizes.largest == 64
    rows = [f"train/{name}/{i}.jpg,{name}" for name in NAMES for i in range(12)]
    table = clean / "labels.csv"
    table.write_text("\n".join(["image,label", *rows, "train/mallard/0.jpg,malard"]))
    tabled = run("data=csv", f"data.root={clean}")
    assert found(tabled, "misspelled") == {"train/mallard/0.jpg"}
    assert found(tabled, "conflict") == {"train/mallard/0.jpg"}
    table.unlink()


def test_captioned_pictures_have_their_captions_looked_through(tmp_path):
    captions = ["ink sketch of a mallard", "ink sketch of a drake", "word " * 80, "caf\ufffd", "a duck"]
    for i, text in enumerate(captions):
        drawing("mallard", i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    copy(tmp_path / "1.png", tmp_path / "copy.jpg")
    (tmp_path / "copy.txt").write_text("another text")
    words = ["data=captions", f"data.root={tmp_path}"]
    result = run(*words)
    assert result.usable
    assert (result.captions.count, result.captions.longest) == (6, 80)
    assert {Path(name).name for name in found(result, "cut")} == {"2.png"}
    assert {Path(name).name for name in found(result, "encoding")} == {"3.png"}
    assert len(found(result, "copies")) == 1
    (tmp_path / "4.txt").unlink()
    result = run(*words)
    assert "has no caption" in result.error
    assert {Path(name).name for name in found(result, "uncaptioned")} == {"4.png"}
    assert "2 begin with 'ink'" in summary(result, tmp_path, None)
    result = run(*words, "data.prompt=a bird", "data.quarantine=nowhere.txt")
    assert "no such file" in result.error
    assert (result.captions.distinct, found(result, "uncaptioned")) == (1, set())


def test_captions_are_measured_by_what_the_pipeline_reads(tmp_path):
    for i, words in enumerate((21, 22, 23, 60)):  # a token each, beside two marks; 24 are read
        drawing("mallard", i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a " * words)
    words = ["data=captions", f"data.root={tmp_path}"]
    result = run("recipe=sketch_style", *words)
    assert {Path(name).name for name in found(result, "cut")} == {"2.png", "3.png"}
    gone = ["objective=diffusion", "model=diffusers", "model.name=./nowhere", "adapter=unet_lora", "data.size=64"]
    assert not found(run(*gone, *words), "cut")  # by words, where there are no tokenizers


def test_classes_far_smaller_than_others_and_missing_ones_are_named():
    sizes = {"much": 200, "some": 60, "little": 15, "hardly": 2}
    rows = [Row(f"{name}/{i}", "train", name) for name, count in sizes.items() for i in range(count)]
    rows += [Row(f"{name}/test", "test", name) for name in ("much", "some")]
    result = look_through(rows, [], 64)
    assert found(result, "few") == {"hardly"}
    assert found(result, "uneven") == {"little"}
    assert found(result, "absent") == {"little", "hardly"}
    assert headline(result) == (
        "classes of fewer than 5 pictures to train on: 1 of 4; classes of less than a 10th of 'much': 1 of 4; "
        "classes without a picture in test: 2 of 4"
    )


def test_names_that_would_upset_a_terminal_are_printed_escaped():
    row = Row("x/\x1b[31m\udcff.png", "train", "a")
    text = summary(
        look_through([row, Row("y", "train", "a\x07bcdefgh"), Row("z", "train", "abcdefgh")], [], 64), None, None
    )
    assert "\x1b" not in text
    assert "\x07" not in text
