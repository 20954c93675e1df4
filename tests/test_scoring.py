"""A split's classes are found among a recogniser's by their names."""

import unicodedata

import numpy as np
import pytest

from vislora.data.splits import ImageSplit, Pixels
from vislora.errors import DataError
from vislora.scoring import labels_among


def test_labels_are_those_of_the_recognizer_in_whatever_order_a_split_has_its_classes():
    split = ImageSplit(("wren", "jay"), [0, 1, 1], ["x", "y", "z"], Pixels(np.zeros((3, 4, 4, 3), np.uint8)))
    assert labels_among(("jay", "owl", "wren"), split).tolist() == [2, 0, 0]
    with pytest.raises(DataError, match=r"class 'jay' of the data is unknown to the adapter, whose .* are owl, wren"):
        labels_among(("owl", "wren"), split)


def test_a_class_is_the_same_whichever_way_its_accents_are_written():
    composed, decomposed = (unicodedata.normalize(form, "Mésange") for form in ("NFC", "NFD"))
    split = ImageSplit(("jay", composed), [1, 0], ["x", "y"], Pixels(np.zeros((2, 4, 4, 3), np.uint8)))
    assert labels_among((decomposed, "jay"), split).tolist() == [0, 1]
