"""An architecture without memory for its weights: its projections, and whether gradients reach adapters on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vislora.beside_peft import in_peft
from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, LowRank, TargetLayer
from vislora.models.vit import input_size
from vislora.targets.timm import attention_classes, available, find_targets

SETTINGS = LoraSettings(rank=2, alpha=4.0)
_FILLS = {Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.clamp_, Tensor.mul_, Tensor.add_}
_FILLS |= {Tensor.erfinv_, Tensor.copy_}


@dataclass(frozen=True)
class Structure:
    """An architecture as the meta device shows it.

    Attributes:
        families: its attention classes.
        parameters: of the model.
        projections: those it has.
        layers: adapted when all of them are.
        layout: the same for architectures of the same modules and parameters, whatever their number and size.
        peft: PEFT on such a layout: "live", "dead" or "refused: …"; None where it isn't installed.
        problem: why it can't be adapted, or which adapters get no gradient.
    """

    name: str
    families: tuple[str, ...]
    parameters: int = 0
    projections: tuple[str, ...] = ()
    layers: int = 0
    layout: str | None = None
    peft: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Reach:
    """Whether gradients reach the adapters of a layout, here and in PEFT; see `Structure`."""

    layout: str
    peft: str | None = None
    problem: str | None = None


def look_at(name: str) -> Structure:
    """Build an architecture on the meta device, and put adapters on every attention and MLP projection."""
    with torch.device("meta"), _Unwritten():
        model = timm.create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        try:
            families = attention_classes(model)
        except AdapterError as error:
            return Structure(name, ("unknown",), parameters, problem=str(error))
        if not families:
            return Structure(name, (), parameters)
        layout = _layout(model)
        projections, targets = everything(model)
        try:
            Adapters(model).add("it", targets, SETTINGS)
        except AdapterError as error:
            return Structure(name, families, parameters, projections, layout=layout, problem=str(error))
        return Structure(name, families, parameters, projections, len(targets), layout)


def reach(name: str) -> Reach:
    """Follow the graph of an architecture's output on the meta device to its adapters; no gradient is computed."""
    with torch.device("meta"), _Unwritten():
        model = timm.create_model(name).eval()
        layout = _layout(model)
        _, targets = everything(model)
        images = torch.empty(2, 3, *[input_size(model)[1]] * 2)
        adapters = Adapters(model)
        adapters.add("it", targets, SETTINGS)
        try:
            problem = _unreached(model, images)
        except (RuntimeError, NotImplementedError) as error:  # an operation that the meta device doesn't know
            return Reach(layout, problem=f"{type(error).__name__}: {error}")
        adapters.remove("it")
        peft = in_peft(model, targets, lambda wrapped, pairs: len({*pairs} - _reached(wrapped(images))))
        return Reach(layout, "dead" if peft and peft.startswith("dead") else peft, problem)


def everything(model: nn.Module) -> tuple[tuple[str, ...], list[TargetLayer]]:
    """All projections of attention and MLPs, and the layers that hold them."""
    projections = tuple(projection for projection in available(model) if projection != "conv")
    return projections, find_targets(model, projections)


def _layout(model: nn.Module) -> str:
    modules = {(re.sub(r"\d+", "*", name), type(module).__qualname__) for name, module in model.named_modules()}
    parameters = {(re.sub(r"\d+", "*", name), "") for name, _ in model.named_parameters()}
    return sha256(repr(sorted(modules | parameters)).encode()).hexdigest()[:16]


def _unreached(model: nn.Module, images: Tensor) -> str | None:
    reached = _reached(model(images))
    pairs = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    cut = [name.removesuffix(".lora") for name, low in pairs.items() if low.lora_B not in reached]
    return f"no gradient reaches {len(cut)} of {len(pairs)} adapters: {', '.join(cut)}" if cut else None


def _reached(output: Tensor) -> set[Tensor]:
    """The parameters that the output's graph leads to."""
    nodes, seen, found = [output.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


class _Unwritten(TorchFunctionMode):
    """Leaves out what is written to parameters: without memory it changes nothing, and takes most of a build."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))
