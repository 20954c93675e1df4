"""Proof that every adapter acts: one tiny batch, one backward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.adaptable import is_adapted
from vislora.lora.reads import is_plain, is_sharded

# A parameter with nothing above this is a gate that starts (almost) closed: a zero head, a LayerScale of 1e-6, through
# which float16 gradients underflow to zero.
_CLOSED = 1e-3


def prove_alive(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Check that every low-rank pair in the model can move the output.

    The gradient of a random projection of the output must reach each pair's B (whose own zero start doesn't matter, its
    gradient being s * dy^T (A x)). Where parameters that start at or near zero (LayerScale gammas, heads, gates) block
    it, the check is repeated with random numbers in their place and BatchNorm by the batch; so a fresh model raises no
    false alarm.

    Args:
        model: with an active adapter.
        forward: computes the model's output on a tiny batch, at least two samples, and two tokens in every attention
            (over one token the softmax is constant, whatever q and k are). A tensor, or tensors in tuples, lists, dicts
            or dataclasses; those of them that a trained parameter can move count.

    Raises:
        AdapterError: no adapter is at work, or inference mode is on; or naming every layer whose pairs get no gradient,
            with the rows of the pairs where others of the layer get one: its weight is read detached from its
            gradient, or its result is unused.
    """
    layers = {name: module for name, module in model.named_modules() if is_adapted(module)}
    if not layers:
        raise AdapterError("nothing to prove: the model has no active, unmerged adapter")
    if any(is_sharded(layer.lora.lora_B) for layer in layers.values()):
        raise AdapterError("gradients prove it, and of a sharded model they are gathered elsewhere; prove it before")
    if torch.is_inference_mode_enabled():
        raise AdapterError("gradients prove it, and torch.inference_mode has none; prove it outside")
    if not any(layer.lora.multiplier for layer in layers.values()):
        raise AdapterError("nothing to prove: the adapter is at scale 0, where it changes nothing")
    # forked, so that the proof doesn't shift the random numbers of the training that follows
    devices = list({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    forked = torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")
    with forked, _evaluating(model), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed devices that aren't forked
        dead = _dead_rows(layers, forward)
        if dead:
            with _evaluating(model), _gates_opened(model):
                dead = _dead_rows({name: layers[name] for name in dead}, forward)
    if dead:
        whole = {name for name, rows in dead.items() if rows == layers[name].lora.rows}
        named = [name if name in whole else f"{name} (rows {_told(rows)})" for name, rows in dead.items()]
        raise AdapterError(
            f"{len(dead)} of {len(layers)} adapted layers can't move the output: {', '.join(named)}; "
            "the model doesn't call them, or doesn't use their result. Choose other targets"
        )


def _dead_rows(layers: dict[str, nn.Module], forward: Callable[[], Any]) -> dict[str, tuple]:
    """The row ranges, by layer, of pairs whose B gets no gradient."""
    outputs = [t.float() for t in _tensors(forward()) if t.requires_grad and t.is_floating_point()]
    bs = [layer.lora.lora_B for layer in layers.values()]
    grads: list[Tensor | None] = [None] * len(bs)
    if outputs:
        wanted = torch.stack([(output * torch.randn_like(output)).sum() for output in outputs]).sum()
        grads = list(torch.autograd.grad(wanted, bs, allow_unused=True))
    dead = {}
    for (name, layer), grad in zip(layers.items(), grads, strict=True):
        rows = layer.lora.rows
        parts = [None] * len(rows) if grad is None else grad.split([stop - start for start, stop in rows])
        if cut := tuple(pair for pair, part in zip(rows, parts, strict=True) if part is None or not part.any()):
            dead[name] = cut
    return dead


def _told(rows: tuple) -> str:
    return ", ".join(f"{start}-{stop - 1}" for start, stop in rows)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode put back.

    Through train mode each time: what a module computes once from its parameters and keeps while in eval mode (LeViT's
    attention biases), it forgets there.
    """
    modes = {module: module.training for module in model.modules()}
    model.train().eval()
    try:
        yield
    finally:
        model.train()
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _gates_opened(model: nn.Module) -> Iterator[None]:
    """Random numbers in every parameter that is zero or nearly so, but lora_B; and BatchNorm by the batch, since with
    the statistics of a fresh model activations shrink from layer to layer, until products of them underflow."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    closed = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.endswith("lora_B") and is_plain(parameter) and parameter.numel() and parameter.abs().max() < _CLOSED
    ]
    before = {tensor: tensor.detach().clone() for tensor in [*closed, *(b for norm in norms for b in norm.buffers())]}
    with torch.no_grad():
        for parameter in closed:
            parameter.normal_(std=0.02)
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)
