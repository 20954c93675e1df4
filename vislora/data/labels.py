"""Names of classes: one spelling of each, and those that may be another one misspelled."""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping

_LONG = 8  # letters from which a single odd one is a likely slip
_SHORT = 5  # letters below which neighbours like cat and bat are the rule
_RARE = 0.25  # share of the other's pictures up to which a name of middle length is likely a slip


def class_name(label: str) -> str:
    """A label with each accented letter as one character (Unicode's NFC): what macOS packs, or its folders hand over,
    has letter and accent apart (NFD), which looks the same and is another text."""
    return unicodedata.normalize("NFC", label)


def misspelled(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs (rarer name, more frequent name) of class names that likely mean one class.

    They are equal but for case, spaces and punctuation; or one letter is added, left out, replaced or exchanged with
    its neighbour. Numbers are told apart, and so are short words, as mouse and house, unless one is rare.
    """
    by_form: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        by_form[_plain(name)].append(name)
    pairs = [(name, names[0]) for names in by_form.values() for name in names[1:]]
    for a, b in _one_slip_apart(list(by_form)):
        few, many = sorted(sum(counts[name] for name in by_form[form]) for form in (a, b))
        if min(len(a), len(b)) >= _LONG or (min(len(a), len(b)) >= _SHORT and few <= _RARE * many):
            pairs.append((by_form[a][0], by_form[b][0]))
    return [tuple(sorted(pair, key=lambda name: (counts[name], name))) for pair in pairs]


def _plain(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split()) or name


def _one_slip_apart(forms: list[str]) -> list[tuple[str, str]]:
    """Pairs of one edit, found by what is left when one letter is taken away: in time linear in their number."""
    by_rest: dict[str, set[str]] = defaultdict(set)
    for form in forms:
        for rest in {form, *(form[:i] + form[i + 1 :] for i in range(len(form)))}:
            by_rest[rest].add(form)
    close = {(a, b) for group in by_rest.values() for a in group for b in group if a < b}
    return sorted((a, b) for a, b in close if _is_slip(a, b))


def _is_slip(a: str, b: str) -> bool:
    """Whether one letter, no digit, is added, replaced or exchanged with its neighbour."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    if any(c.isdigit() for c in a + b):
        return False
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])
