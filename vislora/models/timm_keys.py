"""Which weights timm drew at random, because the file that it loaded has none for them."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import nn

from vislora.errors import ModelError, first_three
from vislora.lora.names import inside

# Buffers that some versions of timm keep in their files, and others work out
_WORKED_OUT = ("attn_mask", "relative_position_index", "relative_coords_table", "num_batches_tracked")


@contextmanager
def keys_told_by_timm() -> Iterator[dict[str, list[str]]]:
    """Names of weights, "Missing" in the file that timm meanwhile loads into a model, and "Unexpected" in it.

    timm answers with the model alone, and its log is the one place where it tells them. What else it warns of there
    is passed on.
    """
    found: dict[str, list[str]] = {"Missing": [], "Unexpected": []}
    log = logging.getLogger("timm.models._builder")
    level = log.level

    def read(record: logging.LogRecord) -> bool:
        if told := re.match(r"(Missing|Unexpected) keys \((.+?)\)", record.getMessage()):
            found[told[1]] += told[2].split(", ")
            return False
        return record.levelno >= max(level, logging.WARNING)

    log.addFilter(read)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeFilter(read)
        log.setLevel(level)


def check_keys(
    source: str, model: nn.Module, name: str, num_classes: int, head: list[str], told: dict[str, list[str]]
) -> list[str]:
    """Refuse a file that lacks weights, or has some that blocks of the model don't; warn of those that settings of the
    model ask for besides, and of those that nothing of the model is called by.

    Args:
        source: where the weights came from, for messages.
        model: what they were loaded into.
        name, num_classes: what timm made the model of, besides settings.
        head: names of the classifier's modules, which are new; a norm that stands beside one, which models pretrained
            without a classifier lack, starts without effect.

    Returns:
        the names of what was drawn at random besides the head: modules of which the file has nothing, and parameters
        of others.

    Raises:
        ModelError: a weight of the architecture as it is by default is in no file, or the file's is another one.
    """
    fresh = [key for key in told["Missing"] if not any(inside(key, part) for part in head)]
    unused = [key for key in told["Unexpected"] if not any(inside(key, part) for part in head)]
    beside = {part.rpartition(".")[0] for part in head} - {""}
    suspects = [key for key in fresh if not any(inside(key, part) for part in beside)]
    if suspects:
        with torch.device("meta"):
            own = timm.create_model(name, num_classes=num_classes).state_dict()
        if lost := [key for key in suspects if key in own]:
            raise ModelError(
                f"{source} lacks {first_three(lost)}: it is incomplete, or another architecture's; fetch it again, or "
                "choose the model.name that it belongs to"
            )
    blocks = [path for path, _ in model.named_modules() if path.rpartition(".")[2].isdigit()]
    within = [key for key in unused if not key.endswith(_WORKED_OUT) and any(inside(key, block) for block in blocks)]
    if within:
        raise ModelError(
            f"{source} has {first_three(within)}, which {name} lacks: it is another architecture's, or a setting takes "
            "them out; choose the model.name that it belongs to"
        )
    if fresh or unused:
        lacking = f"lacks {first_three(fresh)}, which start untrained" if fresh else "fits"
        left = f"; left out of it: {first_three(unused)}" if unused else ""
        warnings.warn(f"{source} {lacking}{left}", stacklevel=3)
    drawn = [key for key, p in model.named_parameters() if key in fresh and p.min() < p.max()]
    return list(dict.fromkeys(_outermost(model, key, set(fresh)) for key in drawn))


def _outermost(model: nn.Module, name: str, fresh: set[str]) -> str:
    """The outermost module that a parameter is in and all of whose parameters are fresh; its own name where there is
    none."""
    while parent := name.rpartition(".")[0]:
        own = {f"{parent}.{key}" for key, _ in model.get_submodule(parent).named_parameters()}
        if not own <= fresh:
            break
        name = parent
    return name
