"""What memory costs the kernel."""

import resource

import torch


def pages_of_a_block() -> int:
    """How many pages the kernel has to give for one more block of 64 MB, at best: what was freed before may have a few
    bytes too little for it."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)
