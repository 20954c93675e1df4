"""A run's task: everything about it that depends on the objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from vislora.data.order import Order
    from vislora.data.preflight import Preflight
    from vislora.metrics.recognition import Evaluation
    from vislora.trainer import Objective

FILES = "data (its files, and their labels or captions)"
PICTURES = "pictures (their sizes and thumbnails)"


@dataclass(frozen=True)
class Outcome:
    """What a finished task left: the artifact's folder, and figures on a test split where there is one."""

    artifact: Path
    test: Evaluation | None = None


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        model: what the trainer trains.
        base: the models whose frozen weights it builds on.
        objective: gives losses and validation figures.
        order: which samples each step sees.
        batches: micro-batches of this process from one step to another.
        validation: batches of this process to validate on, or None.
        about: the data in a few words, for the run's first line.
        contents: hashes, by what they are of, of what is learned from and validated on, and of what it builds on beside
            the weights: a run goes on with the same alone.
        preflight: what was found out about the data.
        finish: exports what was trained into the run folder, and evaluates it.
        head: prefixes of the names of parameters that learn at `optim.head_lr`.
        preview: draws into a file what the model can do so far.
        training: entered while the trainer runs.
    """

    model: nn.Module
    base: Sequence[nn.Module]
    objective: Objective
    order: Order
    batches: Callable[[int, int], Iterable]
    validation: Iterable | None
    about: str
    contents: dict[str, str]
    preflight: Preflight
    finish: Callable[[], Outcome]
    head: tuple[str, ...] = ()
    preview: Callable[[Path], None] | None = None
    training: AbstractContextManager = field(default_factory=nullcontext)
