"""Models whose every weight comes from their files.

timm, diffusers and transformers draw a weight that no file holds at random, and say so in their logs alone.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vislora.errors import ModelError


def open_whole(cls: type[nn.Module], source: str, **options: Any) -> nn.Module:
    """What `cls.from_pretrained` makes of a folder or a name on the hub, from safetensors alone.

    Raises:
        ModelError: a weight of the model is in no file.
    """
    model, found = cls.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where, library = "/".join([source, *filter(None, [options.get("subfolder")])]), cls.__module__.partition(".")[0]
        raise ModelError(
            f"{where}: no file holds {some(missing)} of {cls.__name__}; fetch the model again, or open it with a "
            f"{library} as new as the one that saved it"
        )
    return model


@contextmanager
def keys_told_by_timm() -> Iterator[dict[str, list[str]]]:
    """Names of weights, "Missing" in the file that timm meanwhile loads into a model, and "Unexpected" in it.

    timm answers with the model alone, and its log is the one place where it tells them.
    """
    found: dict[str, list[str]] = {"Missing": [], "Unexpected": []}
    log = logging.getLogger("timm.models._builder")

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if told := re.match(r"(Missing|Unexpected) keys \((.+?)\)", record.getMessage()):
                found[told[1]] += told[2].split(", ")

    reader, level, propagate = Reader(), log.level, log.propagate
    log.addHandler(reader)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(reader)
        log.setLevel(level)
        log.propagate = propagate


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
