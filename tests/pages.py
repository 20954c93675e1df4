"""What memory costs the kernel."""

import resource

import torch


def pages_of_a_block(count: int = 2**24) -> int:
    """How many pages the kernel has to give for one more block of `count` float32, at best: what was freed before may
    have a few bytes too little for it."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(count)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)
