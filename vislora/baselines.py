"""What an adapter is compared with: the base model under the adapter's head, or under a linear probe."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vislora.data.splits import ImageSplit
from vislora.inference import Inference
from vislora.models.vit import head_names
from vislora.recognizer import Recognizer, build_base
from vislora.scoring import labels_among

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 5  # every fifth image of a class chooses the penalty


@contextmanager
def without_update(recognizer: Recognizer) -> Iterator[Recognizer]:
    """The base model with the head of its active adapter, while the context lasts."""
    model, adapters, name = recognizer.model, recognizer.adapters, recognizer.adapters.active
    trained = {path: model.get_submodule(path) for path in head_names(model)}
    adapters.deactivate()  # biases and norms are the base model's too
    own = {path: model.get_submodule(path) for path in trained}
    for path, head in trained.items():
        model.set_submodule(path, head)
    try:
        yield recognizer
    finally:
        for path, head in own.items():
            model.set_submodule(path, head)
        adapters.activate(name)
        model.requires_grad_(False)


def linear_probe(recognizer: Recognizer, train: ImageSplit, weights: str | None, inference: Inference) -> Recognizer:
    """The recognizer's base model, untouched, with a linear classifier fitted to its features of a training split.

    Args:
        weights: the base weights' file, where it has moved since the training.
    """
    base, _ = build_base(recognizer.about, "the model", weights)
    model = _Features(base.requires_grad_(False))
    model.to(inference.accelerator.device)
    features, _ = inference.outputs(model, train, recognizer.preprocessing)
    labels = labels_among(recognizer.classes, train)
    weight, bias = fit_probe(features, labels, len(recognizer.classes))
    probed = _Probed(model, weight, bias).to(inference.accelerator.device)
    return replace(recognizer, model=probed.eval(), adapters=None)


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features [N, D], its penalty chosen on every fifth image of a
    class among `_PENALTIES`, then fitted to all images.

    The penalised likelihood has one maximum, so that nothing hangs on a seed or a learning rate.

    Returns:
        weight [K, D] and bias [K], float32, for features as they came.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    seen, labels = labels.unique(return_inverse=True)
    held = _held_out(labels)
    penalty = _PENALTIES[0]
    if held.any() and not held.all():
        fits = {p: logistic_regression(x[~held], labels[~held], len(seen), p) for p in _PENALTIES}
        penalty = min(fits, key=lambda p: F.cross_entropy(F.linear(x[held], *fits[p]), labels[held]).item())
    found, offset = logistic_regression(x, labels, len(seen), penalty)
    # a class without images is likeliest at minus infinity, where no figure could be computed
    bias = x.new_full((classes,), F.linear(x, found, offset).min().item() - 50.0)
    weight = x.new_zeros(classes, x.shape[1])
    weight[seen] = found / std
    bias[seen] = offset - weight[seen] @ mean
    return weight.float(), bias.float()


def logistic_regression(x: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """The weight [K, D] and bias [K] that minimise mean cross-entropy + penalty / 2 * ||weight||^2, by L-BFGS.

    Args:
        x: float64 [N, D].
        labels: [N].
    """
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach(), bias.detach()


class _Features(nn.Module):
    """What a timm model gives its classifier: images [B, 3, H, W] -> [B, D]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


class _Probed(nn.Module):
    """Features under a linear classifier, which sees them in float32, as it was fitted to them."""

    def __init__(self, features: _Features, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images).float()
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, self.weight, self.bias)


def _held_out(labels: Tensor) -> Tensor:
    """Whether each image is a fifth, tenth, … of its class, [N]."""
    place = torch.zeros_like(labels)
    for k in labels.unique().tolist():
        members = (labels == k).nonzero()[:, 0]
        place[members] = torch.arange(len(members))
    return place % _HELD_OUT == _HELD_OUT - 1
