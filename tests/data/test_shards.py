"""Tar files as webdataset packs them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vislora.compose import configure
from vislora.config.data import ShardsData
from vislora.data.load import load_splits
from vislora.data.quarantine import write_quarantine
from vislora.errors import DataError
from vislora.preflight import preflight


def png(pixels):
    """Of an array [H, W, 3], or of a shade of red."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (4, 4), (pixels, 0, 0)) if isinstance(pixels, int) else Image.fromarray(pixels)
    image.save(buffer, "png")
    return buffer.getvalue()


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_pictures_are_read_at_their_places_in_any_order(tmp_path):
    first = {f"a/{i:03d}.png": png(i) for i in range(3)} | {f"a/{i:03d}.cls": str(i % 2).encode() for i in range(3)}
    pack(tmp_path / "train-00.tar", first)
    pack(tmp_path / "train-01.tar", {"b.json": json.dumps({"label": 1}).encode(), "b.png": png(9), "b.txt": b"x"})
    pack(tmp_path / "eval.tar", {"c.cls": b"1\n", "c.png": png(5)})
    splits = load_splits(ShardsData(root=str(tmp_path), train="train-{00..01}.tar", test="ev*.tar"), 0)
    assert splits.classes == ("0", "1")
    assert splits.train.labels == [0, 1, 0, 1]
    assert [splits.train.image(i).getpixel((0, 0))[0] for i in (3, 0, 2, 1)] == [9, 0, 2, 1]
    assert splits.test.names == [f"{tmp_path / 'eval.tar'}/c.png"]
    assert splits.val is None
    named = load_splits(ShardsData(root=str(tmp_path), train="train-0?.tar", classes=["cat", "dog", "eel"]), 0)
    assert named.classes == ("cat", "dog", "eel")
    assert named.train.labels == [0, 1, 0, 1]


def test_endings_are_read_in_any_case(tmp_path):
    pack(tmp_path / "train.tar", {"A.PNG": png(1), "A.CLS": b"0", "b.png": png(2), "b.Json": b'{"label": 1}'})
    assert load_splits(ShardsData(root=str(tmp_path)), 0).train.labels == [0, 1]


def test_a_label_may_be_told_twice_where_it_is_the_same(tmp_path):
    files = {"a.png": png(1), "a.cls": b"0", "a.json": b'{"label": 0}', "b.png": png(2), "b.cls": b"1", "b.json": b"{}"}
    pack(tmp_path / "train.tar", files)
    assert load_splits(ShardsData(root=str(tmp_path)), 0).train.labels == [0, 1]


def test_what_a_mac_packs_beside_each_file_is_no_picture(tmp_path):
    files = {"0.png": png(1), "0.cls": b"0", "1.png": png(2), "1.cls": b"1"}
    beside = {f"._{name}": b"\0\5\x16\7" for name in files}  # AppleDouble's first bytes
    pack(tmp_path / "train.tar", beside | files | {".DS_Store": b"\0"})
    train = load_splits(ShardsData(root=str(tmp_path)), 0).train
    assert train.names == [f"{tmp_path / 'train.tar'}/{i}.png" for i in range(2)]


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("0.jpg", r"a second picture of 0, 0\.jpg"),
        (".//0.png", r"a second picture of 0, \.//0\.png"),
        ("0.left.png", r"0\.left\.png is no picture of 0.* 0_left"),
    ],
)
def test_a_picture_that_would_be_passed_over_is_refused(tmp_path, file, told):
    pack(tmp_path / "train.tar", {"0.png": png(1), "0.cls": b"0", "1.png": png(2), "1.cls": b"1", file: png(3)})
    with pytest.raises(DataError, match=told):
        load_splits(ShardsData(root=str(tmp_path), train="train.tar"), 0)


@pytest.mark.parametrize("classes", [["2", "1", "0"], ["0", "1", "2"], ["a", "b", "c"]])
def test_label_that_train_lacks_is_refused_whatever_classes_are_called(tmp_path, classes):
    for name, labels in {"train": (0, 1), "val": (2, 0)}.items():
        files = {
            f"{i}.{end}": png(i) if end == "png" else b"%d" % k for i, k in enumerate(labels) for end in ("png", "cls")
        }
        pack(tmp_path / f"{name}.tar", files)
    with pytest.raises(DataError, match=r"val: class '2' of .* isn't among those of train"):
        load_splits(ShardsData(root=str(tmp_path), train="train.tar", val="val.tar", classes=classes), 0)


@pytest.mark.parametrize(("labels", "odd"), [((0, 1, 12), "12"), ((1, 0, "eel"), "eel")])
def test_a_label_that_classes_dont_name_is_told(tmp_path, labels, odd):
    files = [{f"{i}.png": png(i), f"{i}.cls": str(label).encode()} for i, label in enumerate(labels)]
    pack(tmp_path / "train.tar", {name: data for own in files for name, data in own.items()})
    with pytest.raises(DataError, match=f"data.classes names 12 classes, for labels from 0 .* have label '{odd}'; "):
        load_splits(ShardsData(root=str(tmp_path), classes=[f"kind {k}" for k in range(12)]), 0)


def test_quarantine_leaves_out_a_picture_of_a_strange_class(tmp_path):
    for name, labels in {"train": (0, 1), "val": (0, 7)}.items():
        pack(
            tmp_path / f"{name}.tar",
            {
                f"{i}.{end}": png(i) if end == "png" else b"%d" % k
                for i, k in enumerate(labels)
                for end in ("png", "cls")
            },
        )
    (tmp_path / "list.txt").write_text("val.tar/1.png\n")
    found = load_splits(
        ShardsData(root=str(tmp_path), train="train.tar", val="val.tar", quarantine=str(tmp_path / "list.txt")), 0
    )
    assert found.val.labels == [0]


def test_links_and_paths_that_lead_elsewhere_are_not_followed(tmp_path):
    path = pack(tmp_path / "train.tar", {"../../x.png": png(1), "../../x.cls": b"a", "y.png": png(2), "y.cls": b"b"})
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (("z.png", tarfile.SYMTYPE, "/etc/passwd"), ("copy.png", tarfile.LNKTYPE, "y.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    splits = load_splits(ShardsData(root=str(tmp_path)), 0)
    assert len(splits.train) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["train.tar"]
    assert {str(problem.file.relative_to(path)): problem.what for problem in splits.problems} == {
        "z": f"{path}/z is a link to /etc/passwd, and none is followed",
        "copy": f"{path}/copy is a link to y.png, and none is followed",
    }


def test_a_label_without_a_picture_is_told(tmp_path):
    files = {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"1", "c.jxl": b"x", "c.json": b'{"label": 1}'}
    path = pack(tmp_path / "train.tar", files)
    found = preflight(configure("preflight", ["data=shards", f"data.root={tmp_path}"]))
    (told,) = (finding for finding in found.findings if finding.kind == "unread")
    assert [(item.name, item.what) for item in told.items] == [(f"{path}/c", "has a label, but no picture")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"x"}, "a has no a.cls, and no 'label' in a a.json"),
        ({"a.cls": b"1"}, "holds no picture"),
        ({"a.png": b"x", "a.cls": b"\xff"}, r"a\.cls can't be read"),
        ({"a.png": b"x", "a.json": b"[1]"}, r'a\.json: expected \{"label": …, …\}'),
        ({"a.png": b"x", "a.json": b"[" * 60_000}, r"a\.json can't be read"),
        ({"a.png": b"x", "a.json": b'{"label": null}'}, "a has no a.cls"),
        ({"a.png": b"x", "a.json": b'{"label": [1]}'}, r"the label is \[1\]"),
        ({"a.png": b"x", "a.cls": b"1" * 100_000}, "too many for a label"),
        ({"a.cls": b"0", "a.png": b"x", "a.json": b'{"label": 1}'}, r"a has two labels, '0' and in a\.json '1'"),
        ({"a.json": b'{"label": 1}', "a.png": b"x", "a.cls": b"0"}, r"a has two labels, '1' and in a\.cls '0'"),
    ],
)
def test_shards_that_can_not_be_used_are_named(tmp_path, files, message):
    pack(tmp_path / "train.tar", files)
    with pytest.raises(DataError, match=message):
        load_splits(ShardsData(root=str(tmp_path)), 0)


def test_a_shard_is_read_once_and_in_one_split(tmp_path):
    for number in (1, 2, 10):
        files = {f"{i}.{end}": png(i) if end == "png" else b"%d" % i for i in range(2) for end in ("png", "cls")}
        pack(tmp_path / f"train-{number}.tar", files)
    train = load_splits(ShardsData(root=str(tmp_path), train="train-{1..2}*.tar"), 0).train
    assert train.names == [f"{tmp_path}/train-{number}.tar/{i}.png" for number in (1, 10, 2) for i in range(2)]
    with pytest.raises(DataError, match=r"train-2\.tar fits data\.train=\*\.tar and data\.test=train-2\.tar"):
        load_splits(ShardsData(root=str(tmp_path), train="*.tar", test="train-2.tar"), 0)


def test_a_shard_that_goes_on_where_no_entry_can_be_read_is_refused(tmp_path):
    files = {f"{i}.{end}": png(i) if end == "png" else b"%d" % (i % 2) for i in range(4) for end in ("png", "cls")}
    whole = pack(tmp_path / "whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmember("2.png").offset
    broken = {"damaged": whole[:third] + b"?" + whole[third + 1 :], "cut": whole[: third + 99], "two": whole + whole}
    for name, data in broken.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.tar goes on behind byte \d+.* several tar files in one"):
            load_splits(ShardsData(root=str(tmp_path), train=f"{name}.tar"), 0)
    assert len(load_splits(ShardsData(root=str(tmp_path), train="whole.tar"), 0).train) == 4


def test_a_compressed_shard_and_a_missing_one_are_named(tmp_path):
    pack(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0"}, "w:gz")
    with pytest.raises(DataError, match=r"train\.tar can't be read as an uncompressed tar file"):
        load_splits(ShardsData(root=str(tmp_path)), 0)
    with pytest.raises(DataError, match=r"no shard in .* is called x-1\.tar"):
        load_splits(ShardsData(root=str(tmp_path), train="x-{1..2}.tar"), 0)
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=r"no shard in .* is called folder\.tar"):
        load_splits(ShardsData(root=str(tmp_path), train="folder.tar"), 0)
    with pytest.raises(DataError, match=r"x-\{3\.\.1\}\.tar: the range \{3\.\.1\} is empty"):
        load_splits(ShardsData(root=str(tmp_path), train="x-{3..1}.tar"), 0)


@pytest.mark.parametrize("pattern", ["/data/train-*.tar", "", ".", "**.tar"])
def test_a_pattern_that_fits_no_file_in_root_is_refused(tmp_path, pattern):
    told = r"is no pattern of shards: .*; write it relative to data\.root=|no shard in"  # as Python's version sees it
    with pytest.raises(DataError, match=told):
        load_splits(ShardsData(root=str(tmp_path), train=pattern), 0)


def test_pictures_that_can_not_be_used_are_named_and_left_out(tmp_path):
    files = {f"{i}.png": png(50 * i) for i in range(4)} | {f"{i}.cls": str(i % 2).encode() for i in range(4)}
    shard = pack(
        tmp_path / "train.tar", files | {"2.png": b"no picture", "3.png": png(0)[:44], "4.png": b"", "4.cls": b"0"}
    )
    splits = load_splits(ShardsData(root=str(tmp_path), classes=["cat", "dog", "eel"]), 0)
    assert splits.train.names == [f"{shard}/0.png", f"{shard}/1.png"]
    assert {(p.file.name, p.kinds) for p in splits.problems} == {
        ("2.png", ("unknown",)),
        ("3.png", ("damaged",)),
        ("4.png", ("empty",)),
    }
    pack(shard, {"a.png": b"no picture", "a.cls": b"0", "b.png": png(1), "b.cls": b"1"})
    with pytest.raises(DataError, match=r"class '0' has no usable picture to train on .*train\.tar/a\.png is no image"):
        load_splits(ShardsData(root=str(tmp_path)), 0)


def test_a_preflight_finds_copies_in_shards_and_its_list_leaves_them_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    pictures = [png(array) for array in noise]
    pack(
        tmp_path / "train.tar",
        {f"{i}.png": p for i, p in enumerate(pictures)} | {f"{i}.cls": b"01"[i % 2 :][:1] for i in range(4)},
    )
    pack(tmp_path / "test.tar", {"x.png": pictures[2], "x.cls": b"0", "y.png": png(255 - noise[0]), "y.cls": b"1"})
    words = ["data=shards", f"data.root={tmp_path}", "data.test=test.tar"]
    found = preflight(configure("preflight", words))
    assert list(found.leave_out) == [f"{tmp_path / 'train.tar'}/2.png"]
    write_quarantine(found.leave_out, tmp_path, tmp_path / "list.txt")
    data = configure("preflight", [*words, f"data.quarantine={tmp_path / 'list.txt'}"]).data
    assert [Path(name).name for name in load_splits(data, 0).train.names] == ["0.png", "1.png", "3.png"]
