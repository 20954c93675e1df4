"""Tar files as webdataset packs them."""

import io
import json
import tarfile

import pytest
from PIL import Image

from vislora.config import ShardsData
from vislora.data.load import load_splits
from vislora.errors import DataError


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
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
    assert splits.test.names == [f"{tmp_path / 'eval.tar'}/c"]
    assert splits.val is None
    named = load_splits(ShardsData(root=str(tmp_path), train="train-0?.tar", classes=["cat", "dog", "eel"]), 0)
    assert named.classes == ("cat", "dog", "eel")
    assert named.train.labels == [0, 1, 0, 1]


def test_links_and_paths_that_lead_elsewhere_are_not_followed(tmp_path):
    path = pack(tmp_path / "train.tar", {"../../x.png": png(1), "../../x.cls": b"a", "y.png": png(2), "y.cls": b"b"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    splits = load_splits(ShardsData(root=str(tmp_path)), 0)
    assert len(splits.train) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["train.tar"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"x"}, "a has no a.cls, and no 'label' in a a.json"),
        ({"a.cls": b"1"}, "holds no picture"),
        ({"a.png": b"x", "a.cls": b"\xff"}, r"a\.cls can't be read"),
        ({"a.png": b"x", "a.json": b"[1]"}, r"a\.json can't be read"),
        ({"a.png": b"x", "a.json": b'{"label": null}'}, "a has no a.cls"),
        ({"a.png": b"x", "a.json": b'{"label": [1]}'}, r"the label is \[1\]"),
        ({"a.png": b"x", "a.cls": b"1" * 100_000}, "too many for a label"),
    ],
)
def test_shards_that_can_not_be_used_are_named(tmp_path, files, message):
    pack(tmp_path / "train.tar", files)
    with pytest.raises(DataError, match=message):
        load_splits(ShardsData(root=str(tmp_path)), 0)


def test_a_compressed_shard_a_missing_one_and_a_damaged_picture_are_named(tmp_path):
    pack(tmp_path / "train.tar", {"a.png": png(1), "a.cls": b"0"}, "w:gz")
    with pytest.raises(DataError, match=r"train\.tar can't be read as an uncompressed tar file"):
        load_splits(ShardsData(root=str(tmp_path)), 0)
    with pytest.raises(DataError, match=r"no shard in .* is called x-1\.tar"):
        load_splits(ShardsData(root=str(tmp_path), train="x-{1..2}.tar"), 0)
    pack(tmp_path / "bad.tar", {"a.png": png(1), "a.cls": b"0", "b.png": b"no picture", "b.cls": b"1"})
    split = load_splits(ShardsData(root=str(tmp_path), train="bad.tar"), 0).train
    with pytest.raises(DataError, match=r"bad\.tar/b can't be decoded"):
        split.image(1)
