"""Layers and parameters by name, and those layers that a pattern chooses by PEFT's rule."""

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


def module_named(model: nn.Module, path: str) -> nn.Module:
    """As `submodule`, of a name that an adapter gave.

    Raises:
        AdapterError: there is none.
    """
    module = submodule(model, path)
    if module is None:
        raise AdapterError(f"{type(model).__name__} has no module {path!r}: a wrong name, or another model's adapter")
    return module


def parameter_named(model: nn.Module, path: str) -> nn.Parameter:
    """A module's own parameter, of a name that an adapter gave.

    Raises:
        AdapterError: there is none.
    """
    module, _, key = path.rpartition(".")
    parameter = module_named(model, module)._parameters.get(key)
    if parameter is None:
        raise AdapterError(f"{module} has no {key}: a wrong name, or another model's adapter")
    return parameter


def set_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put another one in its place."""
    module, _, key = path.rpartition(".")
    module_named(model, module)._parameters[key] = parameter


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
