"""Files that a list leaves out: what is written is read again, and what doesn't fit is told."""

import os
import unicodedata

import pytest
from PIL import Image

from vislora.config.data import CaptionsData, CsvData, ImageFolderData
from vislora.data.load import load_captions, load_splits
from vislora.data.quarantine import leave_out, write_quarantine
from vislora.errors import DataError

ODD_NAMES = ["plain.png", "with space.png", "#1.png", '"quoted".png', " leading.png", "new\nline.png", "größe.png"]


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(4):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(path)
    return tmp_path


def listed(tree, *lines):
    path = tree / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def names(split, root):
    return [os.path.relpath(name, root) for name in split.names]


def test_listed_files_are_left_out_of_class_folders(tree):
    lines = ["# a remark", "", "train/cat/1.png", str(tree / "test" / "dog" / "0.png"), "./train/cat/../cat/2.png"]
    splits = load_splits(ImageFolderData(root=str(tree), quarantine=listed(tree, *lines)), 0)
    assert names(splits.train, tree) == [
        "train/cat/0.png",
        "train/cat/3.png",
        *(f"train/dog/{i}.png" for i in range(4)),
    ]
    assert len(splits.test) == 7
    assert [problem.kinds for problem in splits.problems] == [("quarantined",)] * 3
    assert "line 3" in splits.problems[0].what


def test_listed_files_are_left_out_whichever_way_accents_are_written(tree):
    composed, decomposed = (unicodedata.normalize(form, "grün.png") for form in ("NFC", "NFD"))
    (tree / "train" / "cat" / "1.png").rename(tree / "train" / "cat" / decomposed)
    splits = load_splits(ImageFolderData(root=str(tree), quarantine=listed(tree, f"train/cat/{composed}")), 0)
    assert f"train/cat/{decomposed}" not in names(splits.train, tree)
    assert len(splits.train) == 7
    assert [problem.kinds for problem in splits.problems] == [("quarantined",)]


def test_listed_files_are_left_out_whichever_way_the_root_is_written(tree, monkeypatch):
    monkeypatch.chdir(tree)
    for root in (".", "train/.."):
        splits = load_splits(ImageFolderData(root=root, quarantine=listed(tree, "train/cat/1.png")), 0)
        assert "train/cat/1.png" not in names(splits.train, root)
        assert len(splits.train) == 7


def test_listed_files_are_left_out_of_tables_and_captions(tree):
    rows = [f"train/{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(4)]
    (tree / "labels.csv").write_text("\n".join(["image,label", *rows]))
    quarantine = listed(tree, "train/dog/3.png")
    splits = load_splits(CsvData(root=str(tree), quarantine=quarantine), 0)
    assert names(splits.train, tree) == [f"train/{n}/{i}.png" for n in ("cat", "dog") for i in range(4)][:-1]
    captioned = load_captions(CaptionsData(root=str(tree), prompt="a pet", quarantine=quarantine))
    assert len(captioned.train) == 15
    assert captioned.problems[0].kinds == ("quarantined",)


@pytest.mark.parametrize("caption", [None, " ", "x" * 5000])
def test_a_picture_whose_caption_cant_be_used_can_be_left_out(tmp_path, caption):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    (tmp_path / "b.txt").unlink() if caption is None else (tmp_path / "b.txt").write_text(caption)
    with pytest.raises(DataError, match="caption"):
        load_captions(CaptionsData(root=str(tmp_path)))
    splits = load_captions(CaptionsData(root=str(tmp_path), quarantine=listed(tmp_path, "b.png")))
    assert list(splits.train.captions) == ["picture a"]


def test_a_listed_file_that_does_not_exist_is_told(tree):
    splits = load_splits(ImageFolderData(root=str(tree), quarantine=listed(tree, "train/cat/gone.png")), 0)
    assert len(splits.train) == 8
    (problem,) = splits.problems
    assert problem.kinds == ("gone",)
    assert "line 1: there is no such file" in problem.what


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: 'nonsense' is none of the pictures"),
        ("train/cat", "line 2: 'train/cat' is none of the pictures"),
        ("list.txt", "line 2: 'list.txt' is none of the pictures"),
        ('"open', "line 2 starts with a quotation mark but is no JSON"),
    ],
)
def test_a_line_that_names_no_picture_is_an_error(tree, line, message):
    with pytest.raises(DataError, match=message):
        load_splits(ImageFolderData(root=str(tree), quarantine=listed(tree, "train/cat/1.png", line)), 0)


def test_a_missing_list_and_a_class_left_empty_are_explained(tree):
    with pytest.raises(DataError, match=r"data\.quarantine=.*no\.txt: there is no such file"):
        load_splits(ImageFolderData(root=str(tree), quarantine=str(tree / "no.txt")), 0)
    everything = listed(tree, *(f"train/dog/{i}.png" for i in range(4)))
    with pytest.raises(DataError, match=r"'dog' has no usable picture to train on .4 files were left out"):
        load_splits(ImageFolderData(root=str(tree), quarantine=everything), 0)


def test_any_file_name_survives_the_list(tmp_path):
    odd = [*ODD_NAMES, os.fsdecode(b"caf\xe9.png")]
    paths = [tmp_path / name for name in odd]
    for path in paths:
        path.touch()
    write_quarantine({str(path): "damaged" for path in paths}, tmp_path, tmp_path / "list.txt")
    kept, told = leave_out({"train": [(path, "x") for path in paths]}, str(tmp_path / "list.txt"), tmp_path)
    assert kept == {"train": []}
    assert {problem.file.name for problem in told} == set(odd)
