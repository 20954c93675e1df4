"""What a training step costs, by variants of one model that take turns in one run.

Ratios are medians over rounds of (variant / limit in the same round), so that a machine whose speed drifts does them no
harm. "saved" is what autograd keeps for backward, parameters aside.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = "frozen limit"
HEADER = f"{'':28}{'precision':>10}{'ms':>9}{'x limit':>9}{'saved MB':>10}{'x limit':>9}"


class Process:
    """A process of its own for a variant that takes its turns there: torch's threads and the C library keep what they
    were started with.

    Args:
        work: a generator function of a module; it yields first what is to be known of the variant, then, whenever it
            is resumed, the seconds of another turn.
        arguments: its own, which are pickled.

    Attributes:
        ready: what it yielded first.
    """

    def __init__(self, work: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        context = get_context("spawn")
        self._there, here = context.Pipe()
        self._process = context.Process(target=_serve, args=(here, work, arguments), daemon=True)
        self._process.start()
        here.close()
        self.ready = self._there.recv()

    def __call__(self) -> float:
        self._there.send("turn")
        return self._there.recv()

    def close(self) -> None:
        """Let it end, and wait until it has: it would take time from what is measured next."""
        self._there.close()
        self._process.join()


def compare(
    name: str,
    models: dict[str, nn.Module],
    loss: Callable[[nn.Module], Tensor],
    precision: str,
    rounds: int,
    processes: Mapping[str, Process] | None = None,
) -> None:
    """Print a line for each variant; the one under `LIMIT` is what the others are measured against.

    Args:
        name: of the table.
        models: variants by title.
        loss: a scalar from a forward pass of one of them.
        precision: what the lines call it.
        rounds: turns of every variant; two more warm up.
        processes: more variants by title, each of which has yielded the bytes that it keeps for backward.
    """
    apart = processes or {}
    saved = {title: saved_bytes(model, loss) for title, model in models.items()}
    saved |= {title: process.ready for title, process in apart.items()}
    times = in_turns({title: partial(step, model, loss) for title, model in models.items()} | {**apart}, rounds)
    print(name)
    for title in times:
        print(
            f"  {title:26}{precision:>10}{1e3 * statistics.median(times[title]):9.1f}"
            f"{ratio(times[title], times[LIMIT]):9.3f}{saved[title] / 1e6:10.1f}{saved[title] / saved[LIMIT]:9.3f}",
            flush=True,
        )


def in_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each variant, which measures itself, took in each round; two more rounds warm up."""
    times: dict[str, list[float]] = {title: [] for title in variants}
    titles = list(variants)
    for turn in range(rounds + 2):
        first = turn % len(titles)
        for title in titles[first:] + titles[:first]:  # none always follows the same one
            seconds = variants[title]()
            if turn >= 2:
                times[title].append(seconds)
    return times


def ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of one variant's time over another's."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def machine() -> str:
    """Where and when this runs."""
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        where = f"{_cpu()}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}; {date.today()}"


def timed(run: Callable[[], object]) -> float:
    """Seconds until it has run, on a GPU too."""
    _synchronize()
    since = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - since


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    seconds = timed(lambda: loss(model).backward())
    model.zero_grad(set_to_none=True)
    return seconds


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes of the distinct storages that the graph keeps for backward and that aren't parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    nodes, seen = [loss(model).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # built-in nodes show what they saved as _saved_*, autograd.Functions as saved_tensors
        found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in [*found, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


def _serve(parent: Connection, work: Callable[..., Iterator[Any]], arguments: tuple) -> None:
    with closing(work(*arguments)) as turns:
        for result in turns:
            parent.send(result)
            try:
                parent.recv()
            except EOFError:  # closed
                break


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
