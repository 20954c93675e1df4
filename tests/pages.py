"""What memory costs the kernel."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import torch


def in_its_own_process(script: str, *words: str, **environment: str) -> str:
    """What a script prints that may import the tests' modules, without settings of glibc's memory but those given."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=own | environment,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def pages_of_a_block(count: int = 2**24) -> int:
    """How many pages the kernel has to give for one more block of `count` float32, at best: what was freed before may
    have a few bytes too little for it."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(count)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)
