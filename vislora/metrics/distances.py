"""How far two sets of pictures are apart, by features of each: nothing is said of any single picture."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

from vislora.errors import DataError
from vislora.metrics.intervals import Interval

_SUBSETS = 400
_ENOUGH = 5  # pictures for each dimension, below which a covariance is more noise than figure


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians with the means and covariances
    of two sets of features [N, D] and [M, D], as Heusel et al. 2017 (https://arxiv.org/abs/1706.08500) take it; on
    features of Inception it is called FID.

    With C1 = R1^T R1 and C2 = R2^T R2 the last trace is the sum of the singular values of R1 R2^T. Other code, that of
    torchmetrics too, takes roots of the eigenvalues of C1 C2: with fewer pictures than dimensions most of those are 0,
    and the roots of their rounding errors add up to several per cent of the distance.

    It is biased upwards by about 1 / N, so that it compares sets of as many pictures alone, and it has no interval: the
    bootstrap, whose draws hold fewer distinct pictures, would lie above the figure itself.

    Raises:
        DataError: a set has fewer than two pictures.
    """
    if (fewest := min(len(one), len(other))) < 2:
        raise DataError(f"a Fréchet distance needs two pictures of each kind; there is {fewest}")
    (mean, root), (other_mean, other_root) = (_mean_and_root(features.double()) for features in (one, other))
    shared = torch.linalg.svdvals(root @ other_root.t()).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * shared
    return max(distance.item(), 0.0)  # rounding alone can take it below


def kernel_distance(
    one: Tensor, other: Tensor, units: Tensor | None = None, subsets: int = _SUBSETS, seed: int = 0
) -> tuple[float, Interval]:
    """The squared maximum mean discrepancy of two sets of features [N, D] and [M, D] under the kernel
    (x y / D + 1)^3, its unbiased estimate (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, who call it KID
    on features of Inception), and a 95% interval. It is 0 on average for two sets of the same kind, whatever their
    sizes, and may be below.

    The interval is that of the estimates over subsets: the deviations of a half of the data, drawn without
    replacement, spread as those of the whole do (the delete-d jackknife of Shao and Wu 1989,
    https://doi.org/10.1214/aos/1176347263, whose factor is 1 for halves).

    Args:
        units: [N], which pictures of `one` belong together, such as those of one prompt; each on its own by default.
            They are drawn together, and no pair of them is counted: pictures of one prompt are alike, and would take
            their set for one of less variety, and so for another kind than the reference.

    Raises:
        DataError: a set has fewer than four units.
    """
    one, other = one.double(), other.double()
    units = torch.arange(len(one)) if units is None else units
    names = units.unique()
    if (fewest := min(len(names), len(other))) < 4:
        raise DataError(f"a kernel distance needs four units of each kind; there are {fewest}")
    kernels = poly_kernel(one, one), poly_kernel(one, other), poly_kernel(other, other)
    apart = (units[:, None] != units).double()
    draws, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        half = names[draws.permutation(len(names))[: len(names) // 2]]
        rows = torch.isin(units, half).nonzero()[:, 0]
        columns = torch.from_numpy(draws.permutation(len(other))[: len(other) // 2])
        within = kernels[0][rows][:, rows], apart[rows][:, rows]
        found.append(_discrepancy(*within, kernels[1][rows][:, columns], kernels[2][columns][:, columns]))
    low, high = np.percentile(found, [2.5, 97.5])
    return _discrepancy(kernels[0], apart, *kernels[1:]), (float(low), float(high))


def sample_warning(pictures: int, reference: int, dimension: int) -> str | None:
    """What to hold against a Fréchet distance of so few pictures; None where there are enough."""
    fewest = min(pictures, reference)
    if fewest >= _ENOUGH * dimension:
        return None
    why = "its covariances are singular" if fewest <= dimension else "its covariances are noisy"
    return (
        f"{pictures} drawn and {reference} reference pictures are few for features of {dimension} dimensions: the "
        f"Fréchet distance is too large ({why}) and compares rows of as many pictures alone; the kernel distance is "
        "free of that bias"
    )


def _discrepancy(xx: Tensor, apart: Tensor, xy: Tensor, yy: Tensor) -> float:
    """From kernel matrices [N, N], [N, M] and [M, M], without the pairs of a picture with itself; of the first those
    that are `apart` (1, others 0)."""
    m = len(yy)
    within = (xx * apart).sum() / apart.sum() + (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D] of features [N, D], and R [min(N, D), D] of which R^T R is their covariance."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
