"""The datasets package's own sets, from a folder of pictures: no hub is needed."""

import datasets
import huggingface_hub.constants as hub
import pytest
from PIL import Image

import vislora.hub
from vislora.config.data import HfData
from vislora.data.findings import Item, about_files
from vislora.data.load import load_splits
from vislora.errors import DataError

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.parquet}
  - {split: hard, path: hard.parquet}
---
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split, count in {"train": 10, "test": 2}.items():
        for k, name in enumerate(["ant", "bee"]):
            for i in range(count):
                path = tmp_path / "set" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", (8, 6), (100 * k, i, 0, 255 if i else 0)).save(path)
    return tmp_path / "set"


def test_splits_labels_and_pictures_are_those_of_the_set(folder):
    splits = load_splits(HfData(name=str(folder), val_fraction=0.2), 0)
    assert splits.classes == ("ant", "bee")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 4)
    assert splits.test.labels == [0, 0, 1, 1]
    assert splits.test.image(2).getpixel((0, 0)) == (255, 255, 255)  # transparent
    assert splits.test.image(3).getpixel((0, 0)) == (100, 1, 0)


def test_rows_without_a_label_are_left_out_and_named_and_withheld_splits_too(folder, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    pictures = [str(folder / "train" / name / f"{i}.png") for name in ("ant", "bee") for i in range(3)]
    (tmp_path / "told").mkdir()
    for split, labels in {
        "train": [0, None, 0, 1, 1, -1],
        "test": [None] * 6,
        "validation": [0, 0, 0, 1, 1, 1],
    }.items():
        rows = {"image": [None, *pictures[1:]] if split == "validation" else pictures, "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "told" / f"{split}.parquet")
    splits = load_splits(HfData(name=str(tmp_path / "told")), 0)
    assert splits.train.labels == [0, 0, 1, 1]
    assert splits.train.names == [f"train/{i:06d}" for i in (0, 2, 3, 4)]
    assert [str(problem.file) for problem in splits.problems] == ["train/000001", "train/000005"]
    (told,) = about_files(splits.problems)
    assert (told.kind, [item.name for item in told.items]) == ("unlabelled", ["train/000001", "train/000005"])
    assert splits.train.image(3).getpixel((0, 0)) == (100, 1, 0)
    assert splits.test is None
    with pytest.raises(DataError, match="validation/000000 can't be decoded: the row holds no picture"):
        splits.val.image(0)


def test_a_split_that_is_called_otherwise_is_named(folder):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    for split in ("train", "hard"):
        rows = {"image": [str(folder / "train" / "ant" / "1.png")] * 4, "label": [0, 0, 1, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder.parent / "two" / f"{split}.parquet")
    (folder.parent / "two" / "README.md").write_text(CARD)
    splits = load_splits(HfData(name=str(folder.parent / "two"), val_fraction=0.0), 0)
    assert (len(splits.train), splits.val, splits.test) == (4, None, None)
    (told,) = about_files(splits.problems)
    assert (told.what, told.items) == ("splits beside train, val and test, not read: 1", (Item("hard", "isn't read"),))


def test_what_is_lacking_is_named(folder):
    with pytest.raises(DataError, match=r"no column 'img'; choose data\.image_column among image, label"):
        load_splits(HfData(name=str(folder), image_column="img"), 0)
    with pytest.raises(DataError, match=r"'image' holds .* not class labels"):
        load_splits(HfData(name=str(folder), label_column="image"), 0)
    with pytest.raises(DataError, match=r"data\.name=.*nowhere can't be loaded"):
        load_splits(HfData(name=str(folder / "nowhere")), 0)


def test_a_hub_out_of_reach_is_told_at_once_and_what_to_do(monkeypatch, caplog):
    for constants in (hub, datasets.config):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://127.0.0.1:9")  # where nothing answers
    monkeypatch.setattr(vislora.hub, "getproxies", dict)
    with pytest.raises(DataError, match=r"data\.name=cifar10 can't be loaded: .*; without the hub it has to be in the"):
        load_splits(HfData(name="cifar10"), 0)
    assert "Retrying" not in caplog.text


@pytest.mark.parametrize("embedded", [False, True], ids=["files", "parquet"])
def test_other_pictures_in_the_same_rows_make_it_another_set(folder, tmp_path, embedded):
    def loaded():
        if not embedded:
            return load_splits(HfData(name=str(folder), val_fraction=0.2), 0)
        parts, table = datasets.load_dataset(str(folder)), tmp_path / f"table{len([*tmp_path.glob('table*')])}"
        for split, part in parts.items():
            table.mkdir(exist_ok=True)
            part.to_parquet(table / f"{split}.parquet")
        return load_splits(HfData(name=str(table), val_fraction=0.2), 0)

    before, again = loaded(), loaded()
    assert before.elsewhere == again.elsewhere
    assert before.held_out_key == again.held_out_key
    ant, bee = (folder / "train" / name / "3.png" for name in ("ant", "bee"))
    was = ant.read_bytes()
    ant.write_bytes(bee.read_bytes())
    bee.write_bytes(was)
    after = loaded()
    assert after.elsewhere != before.elsewhere
    assert after.held_out_key != before.held_out_key
