"""Proof that every adapter acts: one tiny batch, one backward pass."""

from collections.abc import Callable

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
    dead = _without_gradient(layers, forward, model)
    if dead:
        with _filled_zeros(model):
            dead = _without_gradient({name: layers[name] for name in dead}, forward, model)
    if dead:
        raise AdapterError(
            f"{len(dead)} of {len(layers)} adapted layers can't move the output: {', '.join(dead)}; "
            "the model doesn't call them, or doesn't use their result. Choose other targets"
        )


def _without_gradient(layers: dict[str, nn.Module], forward: Callable[[], Tensor], model: nn.Module) -> list[str]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    # forked, so that the proof doesn't shift the random numbers of the training that follows
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        output = forward().float()
        bs = [layer.lora.lora_B for layer in layers.values()]
        wanted = (output * torch.randn_like(output)).sum()
        grads = torch.autograd.grad(wanted, bs, allow_unused=True) if wanted.requires_grad else [None] * len(bs)
    for module, mode in training.items():
        module.training = mode
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


class _filled_zeros:
    """Random numbers in every all-zero parameter but lora_B, for the time of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._zero = [p for n, p in model.named_parameters() if not n.endswith("lora_B") and p.numel() and not p.any()]

    @torch.no_grad()
    def __enter__(self) -> None:
        for parameter in self._zero:
            parameter.normal_(std=0.02)

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for parameter in self._zero:
            parameter.zero_()
