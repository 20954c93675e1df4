"""How patterns choose layers by name: PEFT's rule."""

import re

from vislora.errors import AdapterError


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression fits the end of a dotted name, beginning where a word between dots does; one that
    begins with ^ has to fit the whole name.

    Raises:
        AdapterError: the pattern is no regular expression.
    """
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise AdapterError(f"the pattern {pattern!r} isn't a regular expression: {error}") from None
