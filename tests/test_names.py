"""Names in tables for a terminal."""

from unicodedata import normalize

from vislora.names import aligned


def test_columns_stand_below_each_other_whatever_the_names_are():
    names = ["owl", "丹頂鶴", "부엉이", normalize("NFD", "부엉이"), "cafe\u0301", "นกฮูก", "トキイロ"]
    columns = [3, 6, 6, 6, 4, 4, 8]  # that a terminal gives them
    lines = aligned([("", "F1"), *((name, "100.0%") for name in names)])
    assert lines[0] == " " * (8 + 2 + 4) + "F1"
    for name, columns_of_it, line in zip(names, columns, lines[1:], strict=True):
        assert line == name + " " * (8 - columns_of_it) + "  100.0%"


def test_no_name_goes_over_its_line_or_commands_the_terminal():
    assert aligned([("two\nlines", "1"), ("\x1b[31mred", "2")]) == ["two\\nlines   1", "\\x1b[31mred  2"]


def test_as_many_columns_as_are_wished_are_aligned_to_the_left_and_nothing_ends_in_blanks():
    assert aligned([("a", "bb", "1"), ("aa", "b", "12"), ("", "", "")], left=2) == ["a   bb   1", "aa  b   12", ""]
