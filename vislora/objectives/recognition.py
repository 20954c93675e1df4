"""Recognition: cross-entropy on class logits, validated by top-1."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn


class Patches(Protocol):
    """The part of a model that can be told to look at some of its pictures' patches alone."""

    def showing(self, chosen: Tensor) -> AbstractContextManager[None]:
        """Meanwhile it sees those of these numbers, [B, kept]."""


@dataclass(frozen=True)
class Recognition:
    """Classify images [B, 3, H, W] into K classes.

    Attributes:
        label_smoothing: share of the target spread over all classes, in [0, 1).
        patches: the part of the model that is told which patches of its pictures to look at; batches then hold their
            numbers, [B, kept].
    """

    monitor: ClassVar[str] = "val_top1"
    on_cpu: ClassVar[tuple[str, ...]] = ()
    higher_is_better: ClassVar[bool] = True
    label_smoothing: float = 0.0
    patches: Patches | None = None

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Loss of each sample, [B]."""
        images, labels, *shown = batch
        with nullcontext() if self.patches is None else self.patches.showing(*shown):
            logits = model(images).float()
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def validate(self, model: nn.Module, batches: Iterable, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss and top-1 over all processes' batches of (images, labels, …)."""
        totals = torch.zeros(3, dtype=torch.float64)
        for images, labels, *_ in batches:
            labels = labels.to(accelerator.device)
            logits = model(images.to(accelerator.device)).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            totals += torch.tensor([loss.item(), correct.item(), len(labels)], dtype=torch.float64)
        loss, correct, count = sum(gather_object([totals])).tolist()
        return {"val_loss": loss / count, self.monitor: correct / count}
