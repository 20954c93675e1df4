"""What every data set has to keep to, wherever it comes from."""

import numpy as np
import pytest

from vislora.config.data import BirdsData
from vislora.data import load
from vislora.data.splits import ImageSplit, Pixels, Splits
from vislora.errors import ConfigError, DataError


def split(*classes):
    labels = [k for k in range(len(classes)) for _ in range(4)]
    return ImageSplit(classes, labels, [str(i) for i in range(len(labels))], Pixels(np.zeros((len(labels), 2, 2, 3))))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (Splits(split("a")), "one class alone, 'a', and at least two"),
        (Splits(split("a", "b", "a")), "two classes of the data are called 'a'"),
        (Splits(split("a", "caf\udce9")), r"class 'caf\\udce9' of the data is no text in UTF-8"),
        (
            Splits(split("a", "b"), test=split("a", "c")),
            "test and train have different classes: 'c' where train has 'b'",
        ),
        (Splits(split("a", "b"), val=split("a")), "val and train have different classes: None where train has 'b'"),
    ],
)
def test_inconsistent_classes_are_refused(monkeypatch, splits, message):
    monkeypatch.setitem(load._LOADERS, BirdsData, lambda _: splits)
    with pytest.raises(DataError, match=message):
        load.load_splits(BirdsData(), 0)


def test_the_validation_split_of_the_data_goes_before_one_held_out(monkeypatch):
    own = Splits(split("a", "b"), val=split("a", "b"))
    monkeypatch.setitem(load._LOADERS, BirdsData, lambda _: own)
    assert load.load_splits(BirdsData(val_fraction=0.5), 0) is own


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ConfigError, match=r"data\.val_fraction=.*expected 0 to below 1"):
        BirdsData(val_fraction=fraction)
