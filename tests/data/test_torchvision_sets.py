"""torchvision's classification sets, each from a few pictures in the set's own layout."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vislora.config.data import TorchvisionData
from vislora.data import public
from vislora.data.load import load_splits
from vislora.errors import DataError


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 0, 0)).save(path)


def load(name, root, **settings):
    return load_splits(
        TorchvisionData(name=name, root=str(root), download=False, **{"val_fraction": 0.0} | settings), 0
    )


@pytest.mark.parametrize("name", public._TORCHVISION)
def test_torchvision_knows_each_set_and_the_names_of_its_splits(name, tmp_path):
    for arguments in public._TORCHVISION[name].values():
        with pytest.raises(DataError, match=f"{name} is not complete in") as refusal:
            public._find(name, tmp_path, arguments, download=False)
        # not TypeError or ValueError, which would say that an argument is unknown
        assert isinstance(refusal.value.__cause__, (RuntimeError, OSError))


def test_a_set_without_splits_is_held_out_from(tmp_path):
    for k, name in enumerate(["AnnualCrop", "Forest"]):
        for i in range(10):
            save(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.png", 100 * k + i)
    splits = load("EuroSAT", tmp_path, val_fraction=0.2)
    assert splits.classes == ("AnnualCrop", "Forest")
    assert (len(splits.train), len(splits.val), splits.test) == (16, 4, None)
    for i in range(16):
        assert splits.train.image(i).getpixel((0, 0))[0] // 100 == splits.train.labels[i]


def test_a_set_with_train_and_val(tmp_path):
    for split, count in {"train": 3, "val": 2}.items():
        for wnid in ("n01440764", "n02102040"):
            for i in range(count):
                save(tmp_path / "imagenette2" / split / wnid / f"{wnid}_{i}.JPEG")
    splits = load("Imagenette", tmp_path)
    assert splits.classes == ("tench, Tinca tinca", "English springer, English springer spaniel")
    assert (len(splits.train), len(splits.val), splits.test) == (6, 4, None)
    assert splits.val.labels == [0, 0, 1, 1]


def test_a_set_with_lists_of_its_three_splits(tmp_path):
    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    for part, split in enumerate(["train", "val", "test"]):
        names = [f"{kind}/{kind}_{part}{i}.jpg" for kind in ("banded", "woven") for i in range(2)]
        (root / "labels" / f"{split}1.txt").write_text("\n".join(names))
        for name in names:
            save(root / "images" / name)
    splits = load("DTD", tmp_path)
    assert splits.classes == ("banded", "woven")
    assert [split.labels for split in (splits.train, splits.val, splits.test)] == [[0, 0, 1, 1]] * 3
    assert splits.test.names[3].endswith("woven/woven_21.jpg")


def test_a_set_with_a_table_of_test_labels_and_classes_without_names(tmp_path):
    root = tmp_path / "gtsrb"
    for k in range(3):
        save(root / "GTSRB" / "Training" / f"{k:05d}" / "00000.ppm")
        save(root / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm", k)
    rows = [f"{k:05d}.ppm;{2 - k}" for k in range(3)]
    (root / "GT-final_test.csv").write_text("\n".join(["Filename;ClassId", *rows]))
    splits = load("GTSRB", tmp_path)
    assert splits.classes == ("0", "1", "2")
    assert splits.test.labels == [2, 1, 0]
    assert splits.test.image(1).getpixel((0, 0)) == (1, 0, 0)


def test_a_grey_set_in_binary_files_comes_as_rgb(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in {"train": 12, "t10k": 10}.items():
        pixels = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    splits = load("MNIST", tmp_path)
    assert splits.classes[3] == "3 - three"
    assert splits.test.labels == list(range(10))
    assert splits.test.image(1).getpixel((1, 0)) == ((784 + 1) % 256,) * 3
    assert {*splits.train.names}.isdisjoint(splits.test.names)  # by which preflight knows them


def test_two_classes_of_one_name_are_told_apart(tmp_path):
    wnids = {"n02012849": ("crane",), "n03126707": ("crane",), "n03710721": ("maillot", "tank suit")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            save(tmp_path / split / wnid / "0.JPEG")
    assert load("ImageNet", tmp_path).classes == ("crane (0)", "crane (1)", "maillot, tank suit")


def test_what_could_not_be_downloaded_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DataError, match=r"can't be downloaded \(.*no route") as refusal:
        load_splits(TorchvisionData(name="CIFAR10", root=str(tmp_path)), 0)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def refuse(*_, **__):
    raise OSError("no route to host")
