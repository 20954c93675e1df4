"""Labels that are likely one misspelled, and names that are merely alike."""

import pytest

from vislora.data.labels import misspelled


@pytest.mark.parametrize(
    "rare",
    ["blue_jay", "Blue jay", "blue jay ", "BLUE-JAY", "blue  jay", "blue jya", "blue jayy", "bluejay", "blue hay"],
)
def test_spellings_of_one_name_are_found_the_rarer_one_first(rare):
    assert misspelled({"mallard": 20, "blue jay": 20, rare: 3}) == [(rare, "blue jay")]


@pytest.mark.parametrize(
    ("first", "second"),
    [("mouse", "house"), ("cat", "bat"), ("class 1", "class 2"), ("n01440764", "n01440765"), ("western", "eastern")],
)
def test_names_that_are_merely_alike_are_left_alone(first, second):
    assert misspelled({first: 20, second: 18}) == []


def test_a_rare_name_of_middle_length_is_a_likely_slip():
    assert misspelled({"mouse": 100, "mouze": 2}) == [("mouze", "mouse")]
    assert misspelled({"737-200": 100, "737-300": 2}) == []


def test_no_two_species_of_birds_are_taken_for_one():
    from vislora.data.birds import SPECIES

    assert misspelled(dict.fromkeys(SPECIES, 20)) == []


def test_accents_and_widths_do_not_make_another_class():
    assert misspelled({"zaunkönig": 9, "zaunko\u0308nig": 1}) == [("zaunko\u0308nig", "zaunkönig")]
    assert misspelled({"+": 3, "-": 3}) == []
