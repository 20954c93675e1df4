"""Figures of a set of captions."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_CLIP_WORDS = 75  # CLIP's text encoder takes 77 tokens, two of them marks, and a word is one token or more


@dataclass(frozen=True)
class CaptionFigures:
    """Figures of N captions; which ones are meant is told by their indices.

    Attributes:
        shortest, median, longest: words.
        vocabulary: distinct words, case aside.
        distinct: captions that differ.
        most_frequent: up to five captions that come more than once, with how often.
        first_words: up to five first words, with how often; a trigger word shows here.
        empty: without a word.
        cut: longer than what the text encoder reads.
        odd: with control or replacement characters, as a wrong encoding leaves them.
    """

    count: int
    shortest: int
    median: float
    longest: int
    vocabulary: int
    distinct: int
    most_frequent: list[tuple[str, int]]
    first_words: list[tuple[str, int]]
    empty: list[int]
    cut: list[int]
    odd: list[int]


def longer_than_clip_reads(captions: Sequence[str]) -> list[int]:
    """Indices of captions that CLIP's text encoder doesn't read to the end, for certain."""
    return [i for i, caption in enumerate(captions) if len(caption.split()) > _CLIP_WORDS]


def caption_figures(
    captions: Sequence[str], cut_off: Callable[[Sequence[str]], list[int]] = longer_than_clip_reads
) -> CaptionFigures:
    """Figures of captions, of one at least.

    Args:
        cut_off: captions -> indices of those that the text encoder doesn't read to the end.
    """
    words = [caption.casefold().split() for caption in captions]
    lengths = [len(caption) for caption in words]
    repeated = Counter(" ".join(caption.split()) for caption in captions)
    return CaptionFigures(
        count=len(captions),
        shortest=min(lengths),
        median=statistics.median(lengths),
        longest=max(lengths),
        vocabulary=len({word.strip(".,;:!?\"'()") for caption in words for word in caption}),
        distinct=len(repeated),
        most_frequent=[(text, count) for text, count in repeated.most_common(5) if count > 1],
        first_words=Counter(caption[0] for caption in words if caption).most_common(5),
        empty=[i for i, length in enumerate(lengths) if length == 0],
        cut=cut_off(captions),
        odd=[i for i, text in enumerate(captions) if not _is_plain(text)],
    )


def _is_plain(text: str) -> bool:
    return "\ufffd" not in text and all(c.isprintable() or c.isspace() for c in text)
