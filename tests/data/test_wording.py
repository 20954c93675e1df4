"""Figures of captions."""

from vislora.data.wording import caption_figures


def test_captions_are_counted_by_hand():
    figures = caption_figures(["a red bird", "A red  bird.", "sks, a bird on snow", "a red bird", ""])
    assert (figures.count, figures.distinct) == (5, 4)
    assert (figures.shortest, figures.median, figures.longest) == (0, 3, 5)
    assert figures.vocabulary == len({"a", "red", "bird", "sks", "on", "snow"})
    assert figures.most_frequent == [("a red bird", 2)]
    assert figures.first_words == [("a", 3), ("sks,", 1)]
    assert figures.empty == [4]


def test_captions_that_are_cut_or_wrongly_encoded_are_named():
    figures = caption_figures(["word " * 75, "word " * 76, "caf\ufffd", "tab\tis fine", "bell\x07", "größer"])
    assert figures.cut == [1]
    assert figures.odd == [2, 4]
