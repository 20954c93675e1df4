"""Updates of adapters as dense matrices in float64, and the best that a rank can do."""

import numpy as np

from vislora.lora import LowRankWeights


def delta(weights: LowRankWeights) -> np.ndarray:
    """s B A over all output rows, dense, in float64, written out pair by pair."""
    a, b = weights.lora_A.double().flatten(1).numpy(), weights.lora_B.double().flatten(1).numpy()
    s = weights.alpha / (weights.rank**0.5 if weights.rslora else weights.rank)
    full, offset = np.zeros((weights.out, a.shape[1])), 0
    for i, (start, stop) in enumerate(weights.rows or ((0, weights.out),)):
        height = stop - start
        full[start:stop] = s * b[offset : offset + height] @ a[i * weights.rank : (i + 1) * weights.rank]
        offset += height
    return full


def best(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank], float((s[:rank] ** 2).sum() / (s**2).sum())


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-5 * np.abs(other).max())
