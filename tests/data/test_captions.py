"""Captions from .txt files, from metadata.jsonl, or one prompt for all; none of it is trusted."""

import json
import shutil
import unicodedata

import pytest
from PIL import Image

from vislora.config.data import CaptionsData
from vislora.data.captions import captions_folder
from vislora.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), ("deep/c.png", "green")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), colour).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"a {colour}\n picture ")
    return tmp_path


def read(root, **settings):
    return captions_folder(CaptionsData(root=str(root), **settings))


def test_the_text_beside_a_picture_is_its_caption_in_one_line(folder):
    splits = read(folder)
    assert list(splits.train.captions) == ["a blue picture", "a red picture", "a green picture"]
    assert splits.train.names[0] == str(folder / "a.jpg")
    assert splits.train.pictures[1].getpixel((0, 0)) == (255, 0, 0)
    assert splits.val is None


def test_a_text_in_upper_case_is_found_too(folder):
    (folder / "a.txt").rename(folder / "a.TXT")
    (folder / "b.txt").rename(folder / "b.CAPTION")
    splits = read(folder)
    assert list(splits.train.captions) == ["a blue picture", "a red picture", "a green picture"]
    assert splits.problems == []


def test_a_text_is_beside_its_picture_whichever_way_accents_are_written(folder):
    composed, decomposed = (unicodedata.normalize(form, "grün") for form in ("NFC", "NFD"))
    (folder / "a.jpg").rename(folder / f"{decomposed}.jpg")
    (folder / "a.txt").rename(folder / f"{composed}.txt")
    splits = read(folder)
    assert dict(zip(splits.train.names, splits.train.captions, strict=True))[f"{folder / decomposed}.jpg"] == (
        "a blue picture"
    )
    assert splits.problems == []


def test_one_prompt_stands_for_all_captions(folder):
    assert list(read(folder, prompt="a photo of sks").train.captions) == ["a photo of sks"] * 3


def test_metadata_in_hugging_faces_form_names_pictures_and_their_texts(folder):
    rows = [
        {"file_name": "deep/c.png", "text": "grün"},
        {"file_name": "b.png", "text": "rot", "more": "\u2028\x85\x0c"},
    ]
    text = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # what other writers leave unescaped
    (folder / "metadata.jsonl").write_bytes(text.encode())
    splits = read(folder)
    assert list(splits.train.captions) == ["grün", "rot"]
    assert splits.train.pictures[0].getpixel((0, 0)) == (0, 128, 0)
    assert [(problem.file, problem.kinds) for problem in splits.problems] == [(folder / "a.jpg", ("aside",))]


def test_captions_come_from_caption_files_as_kohyas_scripts_name_them_too(folder):
    (folder / "b.txt").rename(folder / "b.caption")
    assert read(folder).train.captions[1] == "a red picture"
    (folder / "b.txt").write_text("another one")
    with pytest.raises(DataError, match=r"b\.txt and .*b\.caption both hold a caption for b\.png; keep one"):
        read(folder)


def test_a_csv_table_names_pictures_and_their_texts(folder):
    (folder / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,more,text\r\nb.png,,"red, with\r\n a ""line"""\r\n')
    assert list(read(folder).train.captions) == ['red, with a "line"']
    (folder / "metadata.csv").write_text("file_name,text\nb.png,red\na.jpg\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 3: text is None"):
        read(folder)
    (folder / "metadata.csv").write_text("image,text\nb.png,red\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 2: expected a name in the column file_name"):
        read(folder)
    (folder / "metadata.csv").write_text("file_name,text\nb.png,red, at dusk\na.jpg,blue, too\n")
    with pytest.raises(DataError, match=r"metadata\.csv has 2 faulty rows: line 2 has more cells .*; line 3 has more"):
        read(folder)
    (folder / "metadata.csv").write_text('file_name,text\nb.png,"red\n')
    with pytest.raises(DataError, match=r"metadata\.csv.* unexpected end of data"):
        read(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "red"}')
    with pytest.raises(DataError, match="both list pictures; keep one"):
        read(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../x.png", "text": "a"}', "leads out of the folder"),
        ('{"file_name": "/etc/passwd", "text": "a"}', "leads out of the folder"),
        ('{"file_name": "C:\\\\x.png", "text": "a"}', "leads out of the folder"),
        ('{"file_name": "deep\\\\..\\\\..\\\\x.png", "text": "a"}', "leads out of the folder"),
        ('{"file_name": "none.png", "text": "a"}', "none.png is missing"),
        ('{"file_name": ".", "text": "a"}', "expected"),
        ('{"file_name": ".\\\\", "text": "a"}', "expected"),
        ('{"file_name": "b.png"}', "expected"),
        ('{"file_name": "b.png", "text": 3}', "expected"),
        ('["b.png"]', "expected"),
        ("{file_name: b.png}", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        ('{"file_name": "b.png", "text": " "}', "caption is empty"),
        ('{"file_name": "b.png", "text": "a \\u001b[31m bird"}', "control character"),
        ('{"file_name": "b.png", "text": "a \\ud83d bird"}', r"'\\ud83d', one half of a character"),
    ],
)
def test_a_line_of_metadata_that_cant_be_used_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read(folder)
    assert "metadata.jsonl, line 2" in str(caught.value)


def test_a_picture_without_a_caption_is_named_with_what_to_do(folder):
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.png has no caption: write it into b\.txt"):
        read(folder)


def test_a_caption_that_is_no_text_is_named(folder):
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.txt isn't text in UTF-8"):
        read(folder)


def test_a_damaged_picture_is_left_out_and_told(folder):
    (folder / "b.png").write_bytes(b"no image")
    splits = read(folder)
    assert len(splits.train) == 2
    assert [problem.file for problem in splits.problems] == [folder / "b.png"]


@pytest.mark.parametrize("settings", [{}, {"prompt": "a bird"}], ids=["texts", "prompt"])
def test_files_that_are_neither_pictures_nor_text_beside_one_are_noted(folder, settings):
    for name in ("new.jxl", "new.txt", "lost.caption", "deep/README.md", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    splits = read(folder, **settings)
    noted = {problem.file.relative_to(folder).as_posix(): problem.kinds for problem in splits.problems}
    assert noted == dict.fromkeys(["deep/README.md", "lost.caption", "new.jxl"], ("other",))
    assert len(splits.train) == 3


def test_repeats_that_a_folder_asks_for_in_kohyas_way_are_noted(folder):
    (folder / "deep").rename(folder / "10_bird")
    shutil.copytree(folder / "10_bird", folder / "1_owl")
    shutil.copytree(folder / "10_bird", folder / "2024_walk")
    noted = {problem.file: problem.kinds for problem in read(folder).problems}
    assert noted == {folder / "10_bird": ("repeats",)}
    assert read(folder, repeats=10).problems == []


def test_pictures_held_out_are_not_learned_from(folder):
    splits = read(folder, val_fraction=0.34)
    assert len(splits.val) == 1
    assert sorted([*splits.train.names, *splits.val.names]) == sorted(read(folder).train.names)
    with pytest.raises(DataError, match="leaves none on one side"):
        read(folder, val_fraction=0.05)


def test_a_picture_with_several_captions_is_on_one_side(folder):
    once = read(folder, val_fraction=0.34).val.names
    names = ["a.jpg", "b.png", "deep/c.png"] * 2
    rows = [json.dumps({"file_name": name, "text": f"caption {i}"}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    splits = read(folder, val_fraction=0.34)
    assert splits.val.names == once * 2
    assert not set(splits.val.names) & set(splits.train.names)
    assert len(splits.train) == 4


def test_a_folder_that_isnt_there_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no usable picture"):
        read(tmp_path, prompt="x")


@pytest.mark.parametrize("settings", [{}, {"prompt": "a picture"}])
def test_a_link_that_leads_nowhere_is_a_missing_picture(folder, settings):
    (folder / "old.png").symlink_to(folder / "nowhere.png")
    splits = read(folder, **settings)
    assert len(splits.train) == 3
    assert [(problem.file, problem.kinds) for problem in splits.problems] == [(folder / "old.png", ("missing",))]
