"""Proof that every adapter acts: one tiny batch, one backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora.layers import LoraConv2d, LoraLinear


def prove_alive(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Check that every low-rank pair in the model can move the output.

    The gradient of a random projection of the output must reach each pair's B (whose own zero start doesn't matter, its
    gradient being s * dy^T (A x)). Where parameters that start at zero (LayerScale gammas, heads, gates) block it, the
    check is repeated with random numbers in their place; so a fresh model raises no false alarm.

    Args:
        model: with an active adapter.
        forward: computes the model's output on a tiny batch, at least two samples and two tokens.

    Raises:
        AdapterError: naming every layer whose pairs get no gradient: its weight is read past the module, or unused.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear | LoraConv2d)}
    if not layers:
        raise AdapterError("nothing to prove: the model has no active, unmerged adapter")
    # forked, so that the proof doesn't shift the random numbers of the training that follows
    with torch.random.fork_rng(), _evaluating(model), torch.enable_grad():
        torch.manual_seed(0)
        dead = _without_gradient(layers, forward)
        if dead:
            with _filled_zeros(model):
                dead = _without_gradient({name: layers[name] for name in dead}, forward)
    if dead:
        raise AdapterError(
            f"{len(dead)} of {len(layers)} adapted layers can't move the output: {', '.join(dead)}; "
            "the model doesn't call them, or doesn't use their result. Choose other targets"
        )


def _without_gradient(layers: dict[str, nn.Module], forward: Callable[[], Tensor]) -> list[str]:
    output = forward().float()
    bs = [layer.lora.lora_B for layer in layers.values()]
    wanted = (output * torch.randn_like(output)).sum()
    grads = torch.autograd.grad(wanted, bs, allow_unused=True) if wanted.requires_grad else [None] * len(bs)
    return [
        name
        for (name, layer), grad in zip(layers.items(), grads, strict=True)
        if not _every_pair(layer.lora.rows, grad)
    ]


def _every_pair(rows: tuple, grad: Tensor | None) -> bool:
    if grad is None:
        return False
    heights = [stop - start for start, stop in rows]
    return all(bool(part.any()) for part in grad.split(heights))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _filled_zeros(model: nn.Module) -> Iterator[None]:
    """Random numbers in every all-zero parameter but lora_B."""
    zero = [p for name, p in model.named_parameters() if not name.endswith("lora_B") and p.numel() and not p.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.normal_(std=0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()
