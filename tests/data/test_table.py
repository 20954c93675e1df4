"""CSV tables as spreadsheets write them."""

import numpy as np
import pytest
from PIL import Image

from vislora.config.data import CsvData, ImageFolderData
from vislora.data.load import load_splits
from vislora.errors import DataError


@pytest.fixture
def root(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def load(root, text, encoding="utf-8", **settings):
    (root / "labels.csv").write_text(text, encoding=encoding)
    return load_splits(CsvData(root=str(root), **settings), 0)


def test_a_byte_order_mark_quotes_blank_lines_and_other_columns_do_no_harm(root):
    text = 'file,kind,note\r\n0.png,"Größe, klein",x\r\n\r\n1.png, b ,y\r\n'
    splits = load(root, text, "utf-8-sig", image_column="file", label_column="kind")
    assert splits.classes == ("Größe, klein", "b")
    assert splits.train.image(1).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_part_columns_too(root, delimiter):
    rows = [["image", "label", "split"], ["0.png", "Größe, klein", "train"], ["1.png", "b", "train"]]
    splits = load(root, "".join(f"{delimiter.join(row)}\r\n" for row in rows), split_column="split")
    assert splits.classes == ("Größe, klein", "b")
    assert len(splits.train) == 2


def test_columns_are_parted_by_what_stands_outside_of_quotes(root):
    assert load(root, 'image,label,"note; x; y; z"\n0.png,a,1\n1.png,b,2\n').classes == ("a", "b")
    assert load(root, 'image;label;"a, b, c, d"\n0.png;a;1\n1.png;b;2\n').classes == ("a", "b")


def test_labels_that_are_numbers_are_in_their_order(root):
    rows = "".join(f"{i % 4}.png,{label}\n" for i, label in enumerate((10, 9, 2, 0)))
    assert load(root, f"image,label\n{rows}").classes == ("0", "2", "9", "10")


def test_a_table_without_rows_to_train_on_tells_how_to_evaluate_on_it(root):
    with pytest.raises(DataError, match=r"has no row of train, .* call that split train, and give split=train"):
        load(root, "image,label,split\n0.png,a,test\n1.png,b,test\n")


def test_a_table_that_is_a_heading_alone_is_told(root):
    with pytest.raises(DataError, match=r"labels\.csv has no row below its heading; it needs one for each picture"):
        load(root, "image,label\n")


def test_splits_go_by_the_names_that_folders_may_have_and_paths_may_be_windows_own(root):
    (root / "sub").mkdir()
    for i in range(4):
        (root / f"{i}.png").rename(root / "sub" / f"{i}.png")
    rows = ["0.png,a,Training", "1.png,b,train", "2.png,a,validation", "3.png,b,Testing"]
    splits = load(root, "image,label,part\n" + "".join(f"sub\\{row}\n" for row in rows), split_column="part")
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [2, 1, 1]
    assert splits.test.image(0).getpixel((0, 0)) == (3, 3, 3)


def test_a_picture_in_two_spellings_is_one_picture(root, monkeypatch):
    (root / "sub").mkdir()
    again = ["sub/../0.png", "./0.png", "sub\\..\\.\\0.png", str(root / "0.png")]
    rows = ["0.png,a", "1.png,b", *(f"{name},a" for name in again)]
    monkeypatch.chdir(root.parent)  # where the root is a relative path
    (root / "labels.csv").write_text("image,label\n" + "".join(f"{row}\n" for row in rows))
    splits = load_splits(CsvData(root=root.name), 0)
    assert list(splits.train.names) == [f"{root.name}/{name}" for name in ("0.png", "1.png", *["0.png"] * 4)]
    for name in again:
        with pytest.raises(DataError, match=r"line 4: .*/0\.png is in train already, and must not be in val too"):
            load(root, f"image,label,split\n0.png,a,train\n1.png,b,train\n{name},a,val\n")


def test_a_column_called_split_tells_the_splits_unless_another_one_does(root):
    text = "image,label,split,fold\n0.png,a,train,train\n1.png,b,train,train\n2.png,a,test,train\n3.png,b,test,val\n"
    splits = load(root, text)
    assert [len(splits.train), splits.val, len(splits.test)] == [2, None, 2]
    splits = load(root, text, split_column="fold")
    assert [len(splits.train), len(splits.val), splits.test] == [3, 1, None]


def test_empty_cells_beyond_the_columns_do_no_harm(root):
    assert load(root, "image,label,,\n0.png,a,,,,\n1.png,b,,\n").classes == ("a", "b")


def test_absolute_paths_are_taken_as_they_are(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.png"
    Image.new("RGB", (3, 3)).save(elsewhere)
    assert len(load(root, f"image,label\n{elsewhere},a\n1.png,b\n").train) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label,split\n0.png,a,train\n1.png,b,train\n0.png,a,test\n", "line 4: .*0.png is in train already"),
        ("image,label,split\n0.png,a,train\n1.png\n", "line 3: the label is empty"),
        ("image,label,split\n,a,train\n", "line 2: the image is empty"),
        ("image,label,split\n0.png,a,train\n1.png,a,train\n", "one class alone, 'a'"),
        ("image,label,split\n0.png,a,train\n1.png,b,small,train\n", "line 3 has more cells than the first line"),
        (f"image,label,split\n{'x' * 5000}.png,a,train\n", "line 2: .*xx.png is missing"),
        ("image,label,label\n0.png,a,train\n", "two columns 'label'"),
        ("", r"no column 'image' \(data\.image_column\); it has none"),
        ('image,label,split\n0.png,"a,train\n1.png,b,train\n', "the row from line 2 on: unexpected end of data"),
        ('image,"label,split\n0.png,a,train\n', "the row from line 1 on: unexpected end of data"),
    ],
)
def test_rows_that_can_not_be_used_are_named(root, text, message):
    with pytest.raises(DataError, match=message):
        load(root, text, split_column="split")


def test_faulty_rows_are_told_together(root):
    rows = ["image,label,split", "0.png,a,train", ",a,train", "1.png,b,small", "1.png,b,x,train", "9.png,b,train"]
    rows += ["0.png,a,test", '1.png,"b,train']
    with pytest.raises(DataError) as told:
        load(root, "\n".join(rows[:5]), split_column="split")
    assert str(told.value) == (
        f"{root}/labels.csv has 3 faulty rows: line 3: the image is empty; line 4: split is 'small'; expected train, "
        "val or test; line 5 has more cells than the first line; put a cell with ',' in quotes"
    )
    with pytest.raises(
        DataError, match=r"6 faulty rows, the first three: line 3: .*; line 4: .*; line 5 [^;]*; put[^;]*$"
    ):
        load(root, "\n".join(rows), split_column="split")
    with pytest.raises(DataError, match=r"2 faulty rows: line 2: .*9\.png is missing; .*; the row from line 3 on: "):
        load(root, "\n".join([rows[0], rows[5], rows[7]]), split_column="split")


def test_another_encoding_is_named(root):
    with pytest.raises(DataError, match="isn't text in UTF-8"):
        load(root, "image,label\n0.png,größe\n", "latin-1")


def test_a_file_in_place_of_its_folder_is_told(tmp_path):
    (tmp_path / "birds.csv").write_text("image,label\n")
    file = tmp_path / "birds.csv"
    with pytest.raises(DataError, match=r"csv is a file; give the folder that it is in, and data\.table=birds\.csv$"):
        load_splits(CsvData(root=str(file)), 0)
    with pytest.raises(DataError, match=r"birds\.csv is a file; give the folder that it is in$"):
        load_splits(ImageFolderData(root=str(file)), 0)
