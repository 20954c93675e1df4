"""What an architecture's adapters are worth with weights in it, beside PEFT's."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vislora.beside_peft import in_peft, opened_by_peft
from vislora.errors import AdapterError, first_line
from vislora.formats.peft import read_peft, write_peft
from vislora.lora import Adapters, LowRank
from vislora.models.smallest import prove_alive_cheaply
from vislora.structure import SETTINGS, everything

_TOLERANCE = 1e-4  # of float32 outputs, relative


@dataclass(frozen=True)
class Findings:
    """What came out of running an architecture with random weights and adapters on all its projections.

    Attributes:
        size: pixels of the smallest pictures on which all adapters are alive; None where some are dead.
        reloaded: a written and read adapter gives the same output.
        merged: the merged model gives the same output, and unmerging every bit of the weights.
        removed: without the adapter the model gives its own output, bit for bit.
        peft: PEFT on the same layers; see `vislora.beside_peft.in_peft`.
        peft_opens: PEFT gives the same output from the written folder; None where it isn't installed or refuses.
        problem: the error that ended the examination, if one did.
    """

    name: str
    size: int | None = None
    reloaded: bool = False
    merged: bool = False
    removed: bool = False
    peft: str | None = None
    peft_opens: bool | None = None
    problem: str | None = None

    @property
    def sound(self) -> bool:
        return self.problem is None and self.size is not None and self.reloaded and self.merged and self.removed


def examine(name: str) -> Findings:
    """Build an architecture with random weights, and follow an adapter on all its projections through its life."""
    torch.manual_seed(0)
    try:
        return _examined(name)
    except Exception as error:  # whatever a model or PEFT raises is a finding
        return Findings(name, problem=f"{type(error).__name__}: {first_line(error)[:200]}")


def _examined(name: str) -> Findings:
    model = timm.create_model(name, num_classes=5).eval()
    _, targets = everything(model)
    adapters = Adapters(model)
    adapters.add("fresh", targets, SETTINGS)
    size = prove_alive_cheaply(model)
    adapters.remove("fresh")
    images = torch.randn(2, 3, size, size)
    _live_in(model, images)
    plain = _output(model, images)
    base = copy.deepcopy(model)
    adapters.add("it", targets, SETTINGS)
    adapted = _trained_a_little(model, images, plain)
    value = adapters.adapter("it")
    with tempfile.TemporaryDirectory() as folder:
        write_peft(value, Path(folder))
        adapters.load("again", read_peft(Path(folder)))
        reloaded = _same(_output(model, images), adapted)
        opened = opened_by_peft(copy.deepcopy(base), Path(folder), images)
    peft = in_peft(copy.deepcopy(base), targets, partial(_count_dead, images))
    peft_opens = None if opened is None else _same(opened, adapted)
    adapters.remove("again")
    adapters.activate("it")
    adapters.merge()
    merged = _same(_output(model, images), adapted)
    adapters.unmerge()
    adapters.remove("it")
    bits = zip(model.state_dict().values(), base.state_dict().values(), strict=True)
    merged = merged and all(torch.equal(mine, its) for mine, its in bits)
    removed = torch.equal(_output(model, images), plain)
    return Findings(name, size, reloaded, merged, removed, peft, peft_opens)


@torch.no_grad()
def _live_in(model: nn.Module, images: Tensor) -> None:
    """What training does to a fresh model, so that no branch of it is multiplied by zero: its closed gates open, and
    BatchNorm gets the statistics of real activations."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(
                min=0.1
            )  # channels that two pictures leave constant would be blown up layer by layer
    model.train().eval()  # forgets what was computed once from the parameters, as LeViT's attention biases are


@torch.no_grad()
def _trained_a_little(model: nn.Module, images: Tensor, plain: Tensor) -> Tensor:
    """The output once every B is so far from zero that adapted and plain output can be told apart."""
    pairs = [module for module in model.modules() if isinstance(module, LowRank)]
    for std in (0.01, 0.1, 1.0, 10.0, 100.0):
        for low in pairs:
            low.lora_B.normal_(std=std)
        adapted = _output(model, images)
        if _distance(adapted, plain) > 10 * _TOLERANCE:
            return adapted
    raise AdapterError("adapters of any size leave the output as it is")


@torch.no_grad()
def _output(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _same(found: Tensor, wanted: Tensor) -> bool:
    return _distance(found, wanted) < _TOLERANCE


def _count_dead(images: Tensor, model: nn.Module, pairs: list[nn.Parameter]) -> int:
    output = model(images)
    if not output.requires_grad:
        return len(pairs)
    grads = torch.autograd.grad((output * torch.randn_like(output)).sum(), pairs, allow_unused=True)
    return sum(grad is None or not grad.any() for grad in grads)
