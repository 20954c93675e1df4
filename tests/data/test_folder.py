"""A user's own pictures: class folders and tables."""

import csv
import errno
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vislora.config.data import CsvData, ImageFolderData
from vislora.data.findings import Level
from vislora.data.load import load_splits
from vislora.data.preflight import look_through, rows_of
from vislora.errors import DataError


def picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path):
    for split, count in {"train": 6, "val": 2, "test": 3}.items():
        for value, name in enumerate(("cat", "dog", "Zebra finch")):
            for i in range(count):
                picture(tmp_path / split / name / f"{i}.PNG", 10 * value + i)
    return tmp_path


def test_split_folders_become_splits_with_sorted_classes(tree):
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert splits.classes == ("Zebra finch", "cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 9)
    for i in range(len(splits.test)):
        assert splits.classes[splits.test.labels[i]] in splits.test.names[i]
    dog = next(i for i in range(18) if splits.train.names[i].endswith("dog/3.PNG"))
    assert splits.train.image(dog).getpixel((0, 0)) == (13, 13, 13)


def test_what_systems_leave_beside_pictures_is_none(tree):
    picture(tree / "train" / "cat" / "._0.PNG")
    (tree / "train" / "cat" / "._1.PNG").write_bytes(b"Mac OS X")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(splits.train) == 18
    assert splits.problems == []


def test_a_name_is_the_same_whichever_way_its_accents_are_written(tree):
    composed, decomposed = (unicodedata.normalize(form, "Mésange à tête") for form in ("NFC", "NFD"))
    picture(tree / "train" / decomposed / f"{decomposed}.PNG")
    picture(tree / "test" / composed / "1.PNG")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert composed in splits.classes
    assert splits.test.labels.count(splits.classes.index(composed)) == 1

    rows = [(f"train/{decomposed}/{composed}.PNG", decomposed, "train"), ("train/cat/0.PNG", "cat", "train")]
    rows = [(unicodedata.normalize("NFC", image), *rest) for image, *rest in rows]
    rows += [(f"test/{composed}/1.PNG", composed, "test")]
    write_table(tree / "labels.csv", rows)
    table = load_splits(CsvData(root=str(tree)), 0)
    assert table.classes == (composed, "cat")
    assert table.train.names[0] == str(tree / "train" / decomposed / f"{decomposed}.PNG")

    rows.append((f"train/{decomposed}/{composed} 2.PNG", decomposed, "train"))
    picture(tree / "train" / decomposed / f"{composed} 2.PNG")
    write_table(tree / "labels.csv", [(unicodedata.normalize("NFD", image), *rest) for image, *rest in rows])
    assert len(load_splits(CsvData(root=str(tree)), 0).train) == 3

    picture(tree / "train" / composed / "1.PNG")
    with pytest.raises(DataError, match="two classes of the data are called 'Mésange"):
        load_splits(ImageFolderData(root=str(tree)), 0)


def test_without_a_train_folder_it_is_told_how_to_evaluate_what_is_there(tree):
    shutil.rmtree(tree / "train")
    with pytest.raises(DataError, match=r"val, test but no train folder; .*data\.root=.*/val with split=train"):
        load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(load_splits(ImageFolderData(root=str(tree / "test")), 0).train) == 9


def test_class_folders_alone_are_held_out_from_by_class(tmp_path):
    for name, count in {"a": 10, "b": 20, "c": 2}.items():
        for i in range(count):
            picture(tmp_path / name / "deep" / f"{i}.jpg", i)
    config = ImageFolderData(root=str(tmp_path), val_fraction=0.2)
    splits = load_splits(config, 0)
    assert [splits.val.labels.count(k) for k in range(3)] == [2, 4, 1]
    assert not set(splits.val.names) & set(splits.train.names)
    assert len(splits.val) + len(splits.train) == 32
    assert load_splits(config, 0).val.names == splits.val.names
    assert load_splits(config, 1).val.names != splits.val.names
    assert load_splits(ImageFolderData(root=str(tmp_path)), 0).val is None


def test_folders_that_systems_keep_for_themselves_are_no_classes(tree):
    before = load_splits(ImageFolderData(root=str(tree)), 0)
    for folder in (".cache", "__MACOSX"):
        picture(tree / folder / "train" / "cat" / "._a.png")
        picture(tree / "train" / folder / "b.png")
    after = load_splits(ImageFolderData(root=str(tree)), 0)
    assert (after.classes, after.train.names, after.problems) == (before.classes, before.train.names, before.problems)


def test_pictures_that_only_other_programs_read_are_left_out_and_named_too(tree):
    for name in ("phone.HEIC", "phone.heif"):
        (tree / "train" / "cat" / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    picture(tree / "train" / "cat" / "saved.jpg")
    (tree / "train" / "cat" / "saved.jpg").rename(tree / "train" / "cat" / "saved.jfif")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(splits.train) == 19
    assert sorted(problem.file.name for problem in splits.problems) == ["phone.HEIC", "phone.heif"]
    assert not any(problem.usable for problem in splits.problems)


def test_a_split_is_never_passed_over_in_silence(tree):
    picture(tree / "validation" / "cat" / "a.png")
    with pytest.raises(DataError, match=r"val and .*validation are one split by two names"):
        load_splits(ImageFolderData(root=str(tree)), 0)
    shutil.rmtree(tree / "val")
    (tree / "validation" / "cat" / "a.png").rename(tree / "validation" / "loose.png")
    with pytest.raises(DataError, match="validation holds no picture in a class folder"):
        load_splits(ImageFolderData(root=str(tree), val_fraction=0.2), 0)
    (tree / "validation" / "cat" / "a.png").touch()
    with pytest.raises(DataError, match=r"val has no usable picture \(1 files were left out; .*a\.png is empty\)"):
        load_splits(ImageFolderData(root=str(tree), val_fraction=0.2), 0)


def test_pictures_beside_the_class_folders_are_named(tree):
    picture(tree / "extra" / "cat" / "a.png", 1)
    picture(tree / "train" / "loose.png", 2)
    picture(tree / ".cache" / "a.png", 3)
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(splits.train) == 18
    found = {problem.file.relative_to(tree).as_posix(): problem.kinds for problem in splits.problems}
    assert found == {"extra/cat/a.png": ("aside",), "train/loose.png": ("aside",)}


def test_files_in_class_folders_that_are_not_named_as_pictures_are_noted(tree):
    cats = tree / "train" / "cat"
    (cats / "more").mkdir()
    for name in ("photo", "more/raw.CR2", ".DS_Store"):
        (cats / name).write_bytes(b"x")
    (tree / "README.txt").write_text("Cats and dogs.")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert [problem.file.relative_to(cats).as_posix() for problem in splits.problems] == ["more/raw.CR2", "photo"]
    (noted,) = (f for f in look_through(rows_of(splits), splits.problems, None).findings if f.kind == "other")
    assert (noted.level, len(noted.items)) == (Level.note, 2)


def test_links_to_folders_are_followed_and_a_circle_of_them_is_left(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "deep" / "a.png", 1)
    picture(elsewhere / ".hidden" / "b.png", 2)
    cats = tree / "train" / "cat"
    (cats / "more").symlink_to(elsewhere)
    (cats / "again").symlink_to(cats)
    (cats / "up").symlink_to(tree / "train")
    (elsewhere / "deep" / "back").symlink_to(cats)
    (tree / "all").symlink_to(tree / "train")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    names = [name for name, label in zip(splits.train.names, splits.train.labels, strict=True) if label == 1]
    assert names == [*(str(cats / f"{i}.PNG") for i in range(6)), str(cats / "more" / "deep" / "a.png")]
    assert splits.problems == []


def test_a_folder_that_can_not_be_read_is_not_passed_over(tree, monkeypatch):
    closed, scandir = tree / "train" / "cat" / "more", os.scandir
    picture(closed / "a.png")

    def refusing(path):  # as the system does; chmod does nothing to root
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="more"):
        load_splits(ImageFolderData(root=str(tree)), 0)


def test_upper_case_splits_are_splits(tree):
    for split in ("train", "val", "test"):
        (tree / split).rename(tree / split.title())
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert splits.classes == ("Zebra finch", "cat", "dog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 9)
    assert splits.problems == []


def test_unreadable_files_are_left_out_and_named(tree):
    (tree / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(splits.train) == 18
    (problem,) = splits.problems
    assert problem.file.name == "broken.jpg"
    assert not problem.usable


def test_folders_that_can_not_be_trained_on_are_explained(tree, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_splits(ImageFolderData(root=str(tmp_path / "nowhere")), 0)
    with pytest.raises(DataError, match="cat holds no class folder; pictures lie in root/CLASS"):
        load_splits(ImageFolderData(root=str(tree / "train" / "cat")), 0)
    picture(tree / "test" / "wolf" / "1.png")
    with pytest.raises(DataError, match="'wolf' is unknown"):
        load_splits(ImageFolderData(root=str(tree)), 0)
    (tree / "test" / "wolf" / "1.png").unlink()
    (tree / "test" / "wolf").rmdir()
    for file in (tree / "train" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"'dog' has no usable picture to train on \(6 files were left out"):
        load_splits(ImageFolderData(root=str(tree)), 0)


def write_table(path, rows, header=("image", "label", "split")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_a_table_gives_labels_and_splits(tree):
    rows = [(f"{s}/cat/{i}.PNG", "feline", s) for s in ("train", "test") for i in range(3)]
    rows += [(f"{s}/dog/{i}.PNG", "canine", s) for s in ("train", "test") for i in range(3)]
    write_table(tree / "labels.csv", rows)
    splits = load_splits(CsvData(root=str(tree), split_column="split"), 0)
    assert splits.classes == ("canine", "feline")
    assert (len(splits.train), splits.val, len(splits.test)) == (6, None, 6)
    write_table(tree / "labels.csv", [row[:2] for row in rows], ("image", "label"))
    whole = load_splits(CsvData(root=str(tree), val_fraction=0.5), 0)
    assert (len(whole.train), len(whole.val)) == (6, 6)


def test_faults_of_a_table_are_named_with_their_line(tree):
    config = CsvData(root=str(tree), split_column="split")
    with pytest.raises(DataError, match=r"labels\.csv is missing"):
        load_splits(config, 0)
    good = [("train/cat/0.PNG", "a", "train"), ("train/dog/0.PNG", "b", "train")]
    for row, message in [
        (("train/cat/99.PNG", "a", "train"), "line 4.*99.PNG is missing"),
        (("train/cat/1.PNG", " ", "train"), "line 4: the label is empty"),
        (("train/cat/1.PNG", "a", "dev"), "line 4: split is 'dev'"),
        (("test/cat/1.PNG", "c", "test"), "'c' of .* isn't among"),
    ]:
        write_table(tree / "labels.csv", [*good, row])
        with pytest.raises(DataError, match=message):
            load_splits(config, 0)
    write_table(tree / "labels.csv", good, ("file", "label", "split"))
    with pytest.raises(DataError, match=r"no column 'image' \(data\.image_column\); it has file, label, split"):
        load_splits(config, 0)


def test_a_link_that_leads_nowhere_is_a_missing_picture(tree):
    (tree / "train" / "cat" / "0.PNG").unlink()
    (tree / "train" / "cat" / "0.PNG").symlink_to(tree / "nowhere.png")
    splits = load_splits(ImageFolderData(root=str(tree)), 0)
    assert len(splits.train) == 17
    (problem,) = splits.problems
    assert (problem.file, problem.kinds) == (tree / "train" / "cat" / "0.PNG", ("missing",))


def test_a_class_that_is_called_like_a_split_is_told(tmp_path):
    for name in ("train", "bus", "car"):
        picture(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="train holds pictures, and is taken for a split by its name"):
        load_splits(ImageFolderData(root=str(tmp_path)), 0)
