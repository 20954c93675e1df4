"""Prompts as people write them, and the sentence a malformed one is answered with."""

import pytest

from vislora.data.prompts import Prompt, read_prompts
from vislora.errors import ConfigError, DataError


def test_a_text_file_has_a_prompt_a_line_and_perhaps_its_label(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa blue jay,  facing left | blue jay\n\na barn owl\r\na | b | c\n", "utf-8")
    found = read_prompts(str(tmp_path / "p.txt"), "prompts")
    assert found == [Prompt("a blue jay, facing left", "blue jay"), Prompt("a barn owl"), Prompt("a | b", "c")]
    assert read_prompts(["a blue jay, facing left | blue jay", "a barn owl", "a | b | c"], "prompts") == found


def test_a_line_of_a_file_may_be_a_remark(tmp_path):
    (tmp_path / "p.txt").write_text("# drawn by | hand\na blue jay | #1\n  #owls\na barn owl\n|\n")
    with pytest.raises(DataError, match=r"p\.txt, line 5: the caption is empty"):
        read_prompts(str(tmp_path / "p.txt"), "prompts")
    (tmp_path / "p.txt").write_text("# drawn by | hand\na blue jay | #1\n  #owls\na barn owl\n")
    assert read_prompts(str(tmp_path / "p.txt"), "prompts") == [Prompt("a blue jay", "#1"), Prompt("a barn owl")]
    assert read_prompts(["# a"], "prompts") == [Prompt("# a")]


def test_json_lines_hold_the_same(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a | b", "label": "c"}\n\n{"prompt": "d"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl"), "prompts") == [Prompt("a | b", "c"), Prompt("d")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", "a\nb\na\n", "'a' comes twice"),
        ("a.txt", "a |\n", "line 1: the label: the caption is empty"),
        ("a.txt", "a\n| b\n", "line 2: the caption is empty"),
        ("a.txt", "a\x00b\n", "control character"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: expected"),
        ("a.jsonl", "[1]\n", "line 1: expected"),
        ("a.jsonl", "a blue jay\n", "line 1 isn't JSON"),
    ],
)
def test_malformed_prompts_are_told_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(str(tmp_path / name), "prompts")


def test_what_is_neither_a_file_nor_a_list_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unrelated=a blue jay: there is no such file; write a list"):
        read_prompts("a blue jay", "unrelated")
    with pytest.raises(ConfigError, match="there is no such file; write a list as prompts="):
        read_prompts("a blue jay, " * 500, "prompts")
    with pytest.raises(ConfigError, match="expected a file, or a list of texts"):
        read_prompts([1, 2], "prompts")
    (tmp_path / "latin").write_bytes(b"\xe4")
    with pytest.raises(DataError, match="isn't text in UTF-8"):
        read_prompts(str(tmp_path / "latin"), "prompts")
