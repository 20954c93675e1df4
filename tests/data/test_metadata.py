"""Hugging Face's image folders with labels."""

import json

import pytest
from PIL import Image

from vislora.config.data import MetadataData
from vislora.data.load import load_splits
from vislora.errors import DataError


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        name = row.get("file_name", "")
        if isinstance(name, str) and name.startswith("p"):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def test_splits_and_labels_are_those_of_the_tables(tmp_path):
    write(tmp_path / "train", [{"file_name": f"p{i}.png", "label": i % 12} for i in range(24)])
    write(tmp_path / "test", [{"file_name": "p.png", "label": 10, "note": "x"}])
    splits = load_splits(MetadataData(root=str(tmp_path)), 0)
    assert splits.classes == tuple(map(str, range(12)))  # 10 behind 9
    assert splits.train.labels == [i % 12 for i in range(24)]
    assert (splits.val, splits.test.labels) == (None, [10])
    assert splits.train.image(7).getpixel((0, 0)) == (7, 0, 0)
    assert splits.problems == []


def test_a_csv_table_gives_the_same_labels(tmp_path):
    write(tmp_path, [{"file_name": f"p{i}.png", "label": i % 12} for i in range(24)])
    expected = load_splits(MetadataData(root=str(tmp_path)), 0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines() if line]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(
        "label,file_name\n" + "".join(f"{r['label']},{r['file_name']}\n" for r in rows)
    )
    found = load_splits(MetadataData(root=str(tmp_path)), 0)
    assert (found.classes, found.train.labels) == (expected.classes, expected.train.labels)


def test_a_colon_as_of_a_time_leads_nowhere_but_a_drive_of_windows_does(tmp_path):
    rows = [{"file_name": f"photo of 10:3{i}:00.png", "label": "ab"[i]} for i in range(2)]
    write(tmp_path, rows)
    train = load_splits(MetadataData(root=str(tmp_path)), 0).train
    assert train.names == [str(tmp_path / row["file_name"]) for row in rows]
    write(tmp_path, [*rows, {"file_name": "C:p.png", "label": "a"}])
    with pytest.raises(DataError, match=r"'C:p\.png' leads out of the folder"):
        load_splits(MetadataData(root=str(tmp_path)), 0)


def test_rows_that_are_longer_than_the_first_are_named(tmp_path):
    write(tmp_path, [{"file_name": f"p{i}.png", "label": i} for i in range(2)])
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,label\np0.png,a\np1.png,b\np0.png,a,more\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 4"):
        load_splits(MetadataData(root=str(tmp_path)), 0)


def test_two_tables_of_one_folder_are_refused(tmp_path):
    write(tmp_path, [{"file_name": f"p{i}.png", "label": i} for i in range(2)])
    (tmp_path / "metadata.csv").write_text("file_name,label\np0.png,a\np1.png,b\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl and .*metadata\.csv both list pictures; keep one"):
        load_splits(MetadataData(root=str(tmp_path)), 0)


def test_pictures_that_no_table_lists_are_named(tmp_path):
    write(tmp_path / "train", [{"file_name": f"p{i}.png", "label": i} for i in range(2)])
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "more.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "beside.png")
    found = {problem.file.name: problem.kinds for problem in load_splits(MetadataData(root=str(tmp_path)), 0).problems}
    assert found == {"more.png": ("aside",), "beside.png": ("aside",)}


def test_a_link_that_leads_nowhere_is_a_missing_picture(tmp_path):
    write(tmp_path / "train", [{"file_name": f"p{i}.png", "label": i} for i in range(2)])
    link = tmp_path / "train" / "old.png"
    link.symlink_to(tmp_path / "nowhere.png")
    (problem,) = load_splits(MetadataData(root=str(tmp_path)), 0).problems
    assert (problem.file, problem.kinds, problem.usable) == (link, ("missing",), False)


def test_one_table_is_all_train_and_another_key_can_hold_the_label(tmp_path):
    write(tmp_path, [{"file_name": f"p{i}.png", "kind": "ab"[i % 2]} for i in range(4)])
    assert load_splits(MetadataData(root=str(tmp_path), label_key="kind"), 0).classes == ("a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../p.png", "label": "a"}, "line 3: '../p.png' leads out of the folder"),
        ({"file_name": "/etc/passwd", "label": "a"}, "line 3: '/etc/passwd' leads out of the folder"),
        ({"file_name": "q.png", "label": "a"}, "line 3: .*q.png is missing"),
        ({"file_name": f"{'x' * 5000}.png", "label": "a"}, "line 3: .*xx.png is missing"),
        ({"file_name": "p9.png", "kind": "a"}, r"line 3 has no 'label' \(data\.label_key\); it has file_name, kind$"),
        ({"file_name": "p9.png", "label": None}, "line 3: 'label' is None; expected a class's name or number"),
        ({"file_name": "p9.png", "label": True}, "line 3: 'label' is True"),
        ({"label": "a"}, 'line 3: expected {"file_name"'),
    ],
)
def test_rows_that_can_not_be_used_are_named(tmp_path, row, message):
    write(tmp_path, [{"file_name": "p0.png", "label": "a"}, {"file_name": "p1.png", "label": "b"}, row])
    with pytest.raises(DataError, match=message):
        load_splits(MetadataData(root=str(tmp_path)), 0)


def test_table_without_a_row_is_refused(tmp_path):
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(DataError, match="a metadata table without a row"):
        load_splits(MetadataData(root=str(tmp_path)), 0)


def test_spaces_around_a_label_are_no_part_of_it(tmp_path):
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(("wren", " wren ", "owl"))]
    for row in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_splits(MetadataData(root=str(tmp_path)), 0).classes == ("owl", "wren")
