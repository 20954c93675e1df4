"""Layers by name: one, and those that a pattern chooses by PEFT's rule."""

import re

from torch import nn

from vislora.errors import AdapterError


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """As `model.get_submodule(path)`, but None where there is none, and ten times as fast: that asks every module for
    an attribute twice, which classes of diffusers answer in Python."""
    for word in path.split(".") if path else ():
        model = model._modules[word] if word in model._modules else getattr(model, word, None)
        if not isinstance(model, nn.Module):
            return None
    return model


def inside(name: str, module: str) -> bool:
    """Whether a layer of this name is a module of that name, or a part of it; all are parts of "", the model."""
    return not module or f"{name}.".startswith(f"{module}.")


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
