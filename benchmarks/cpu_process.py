"""python benchmarks/cpu_process.py [--rounds 20] [recipe=NAME key=value …]

What a recipe's training step costs a CPU in a process as Python starts it; where numbers below 1.2e-38 count as zero;
where what is freed stays with the process; and with both, as in a training by `vislora.train`. Each way has a process
of its own, because torch's threads and the C library keep what they were started with; they take turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch
from interleaved import Process, in_turns, machine, ratio

from vislora.compose import configure
from vislora.precision import (
    denormals_as_zero,
    freed_memory_kept,
    new_accelerator,
    own_device,
    resolve_precision,
    training_attention,
)
from vislora.train import kind_of

# whether denormals count as zero, and whether freed memory is kept
VARIANTS = {
    "as it is": (False, False),
    "denormals as zero": (True, False),
    "freed memory kept": (False, True),
    "both": (True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("overrides", nargs="*", default=["recipe=vit_birds"])
    options = parser.parse_args()
    processes = {title: Process(steps, *settings, options.overrides) for title, settings in VARIANTS.items()}
    times = in_turns(processes, options.rounds)
    for process in processes.values():
        process.close()
    print(f"{machine()}; {' '.join(options.overrides)}")
    for title in VARIANTS:
        milliseconds = 1e3 * statistics.median(times[title])
        print(f"{title:20}{milliseconds:9.1f} ms{ratio(times[title], times['as it is']):8.2f}")


def steps(zero: bool, kept: bool, overrides: list[str]) -> Iterator[float | None]:
    """The seconds of the recipe's steps, one after the other, once it is ready."""
    with (
        denormals_as_zero() if zero else nullcontext(),
        freed_memory_kept(own_device()) if kept else nullcontext(),
        tempfile.TemporaryDirectory() as out,
    ):
        config = configure("train", overrides)
        precision = resolve_precision(config.trainer.precision, own_device())
        accelerator = new_accelerator(precision)
        task = import_module(kind_of(config).module).prepare(config, precision, accelerator, Path(out))
        with task.training:
            model = accelerator.prepare(task.model.train())
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
            yield None
            for batch in task.batches(0, config.trainer.epochs * task.order.steps_per_epoch):
                since = time.perf_counter()
                with training_attention(accelerator):
                    accelerator.backward(task.objective.losses(model, batch).mean())
                optimizer.step()
                optimizer.zero_grad()
                yield time.perf_counter() - since


if __name__ == "__main__":
    main()
