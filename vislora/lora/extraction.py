"""Extract an adapter from two sets of weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from vislora.errors import AdapterError, first_three
from vislora.lora.adapter import Adapter, LowRankWeights
from vislora.lora.energy import Computed, check_wish, choose_rank
from vislora.lora.names import inside


def extract(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rank: int | None = None,
    energy: float | None = None,
    trained: Sequence[str] = (),
    ignore: Sequence[str] = (),
    unfit: Collection[str] = (),
) -> Computed:
    """The adapter that turns one model's weights into another's, by truncated SVD of their differences.

    Matrices and convolution kernels become low-rank layers of scale 1, beside which their biases are kept; modules that
    hold anything else that changed (norms, scales, depthwise kernels), or a weight of another shape (a new head), are
    kept in full.

    Args:
        base: the state dict of the base model.
        tuned: the state dict of the same architecture after training.
        rank: the largest rank of a layer.
        energy: the share of each difference's squared norm to keep, in (0, 1]; the smallest rank that does is taken.
        trained: names of modules to keep in full whatever changed in them (the head).
        ignore: patterns (`*.bias`) of changed tensors that may be left out.
        unfit: names of modules to keep in full if they changed, though a shape says otherwise: no state dict tells
            embeddings from matrices, nor grouped or dilated convolutions, which can't be adapted, from others.

    Raises:
        AdapterError: neither rank nor energy, a pattern that fits no tensor, models of different architectures, nothing
            changed, a change that neither a low-rank layer nor a module kept in full can hold, or one that isn't
            finite.
    """
    check_wish(rank, energy)
    changes = _sorted_changes(base, tuned, trained, ignore, unfit)
    _check_finite(base, tuned, changes)
    layers, kept = {}, {}
    for key in changes.matrices:
        difference = tuned[key].double() - base[key].double()
        layers[_module(key)], kept[_module(key)] = _truncated(difference, rank, energy)
    states = {
        name: {key.removeprefix(f"{name}."): tuned[key] for key in tuned if _part_of(key, [name])}
        for name in changes.modules
    }
    adapter = Adapter(
        layers,
        {name: _copies(state) for name, state in states.items()},
        biases=_copies({key: tuned[key] for key in changes.biases}),
    )
    return Computed(adapter, kept, changes.ignored)


@dataclass(frozen=True)
class _Changes:
    """What changed, by how an adapter holds it: names of weights and biases of low-rank layers, of modules that are
    kept in full, and of tensors that are left out."""

    matrices: list[str]
    biases: list[str]
    modules: list[str]
    ignored: tuple[str, ...]


def _sorted_changes(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    trained: Sequence[str],
    ignore: Sequence[str],
    unfit: Collection[str],
) -> _Changes:
    """Or an AdapterError where something has no place; the arguments are those of `extract`."""
    if idle := [pattern for pattern in ignore if not any(fnmatchcase(key, pattern) for key in tuned)]:
        raise AdapterError(f"ignore={idle}: the tuned weights hold no tensor of such a name; leave it out")
    if empty := [name for name in trained if not any(_part_of(key, [name]) for key in tuned)]:
        raise AdapterError(f"trained={empty}: the tuned weights hold no such module")
    changed = [key for key in tuned if not _part_of(key, trained) and _differs(base.get(key), tuned[key])]
    ignored = [key for key in changed if any(fnmatchcase(key, pattern) for pattern in ignore)]
    changed = [key for key in changed if key not in ignored]
    matrices = [key for key in changed if _is_matrix(key, base.get(key), tuned[key]) and _module(key) not in unfit]
    adapted = {_module(key) for key in matrices}
    biases = [key for key in changed if key.endswith(".bias") and _module(key) in adapted]
    rest = [key for key in changed if key not in matrices and key not in biases]
    odd = [key for key in rest if not _module(key) or any(inside(name, _module(key)) for name in adapted)]
    if odd:
        patterns = sorted({f"*.{key.rpartition('.')[2]}" if "." in key else key for key in odd})
        or_keep = ", or keep the modules that hold them in full with trained=[…]" if any(map(_module, odd)) else ""
        raise AdapterError(
            f"{len(odd)} changed tensors fit neither a low-rank layer nor a module kept in full: {first_three(odd)}; "
            f"leave them out with 'ignore=[{','.join(patterns)}]'{or_keep}"
        )
    lost = [key for key in base if key not in tuned and not _part_of(key, trained)]
    new = [key for key in biases if key not in base]
    for title, keys in (("tuned", lost), ("base", new)):
        if keys:
            raise AdapterError(
                f"the {title} weights lack {first_three(keys)}; base and tuned must be of one architecture"
            )
    if not matrices:
        raise AdapterError("no matrix differs between the base and the tuned weights; there is nothing to extract")
    modules = list(dict.fromkeys([*trained, *map(_module, rest)]))
    return _Changes(matrices, biases, modules, tuple(key for key in ignored if not _part_of(key, modules)))


def _check_finite(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], changes: _Changes) -> None:
    low_rank = [*changes.matrices, *changes.biases]
    kept = [key for key in tuned if key in low_rank or _part_of(key, changes.modules)]
    for title, weights, keys in (("tuned", tuned, kept), ("base", base, changes.matrices)):
        # cast, since torch can't tell it of 8 bits
        if broken := [key for key in keys if not weights[key].double().isfinite().all()]:
            raise AdapterError(f"the {title} weights are broken; not all numbers are finite in {first_three(broken)}")


def _truncated(change: Tensor, rank: int | None, energy: float | None) -> tuple[LowRankWeights, float]:
    difference = change.flatten(1)
    # The eigenvectors of the smaller Gram matrix: in float64 as good as a float32 SVD, and several times faster
    wide = difference.shape[0] <= difference.shape[1]
    side = difference if wide else difference.t()
    squares, vectors = torch.linalg.eigh(side @ side.t())
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    r, kept = choose_rank(squares, rank, energy)
    root, u = squares[:r].sqrt().sqrt(), vectors[:, :r]
    near, far = u * root, (u.t() @ side) / root[:, None]  # near @ far is the best approximation of `side`
    b, a = (near, far) if wide else (far.t(), near.t())
    out, kernel = change.shape[0], change.shape[1:]
    a = a.float().cpu().reshape(r, *kernel)
    b = b.float().cpu().reshape(out, r, *[1] * (change.dim() - 2))
    return LowRankWeights(a.contiguous(), b.contiguous(), r, float(r), out), kept


def _is_matrix(key: str, base: Tensor | None, tuned: Tensor) -> bool:
    if not key.endswith(".weight") or base is None or base.shape != tuned.shape:
        return False
    return tuned.dim() == 2 or (tuned.dim() == 4 and tuned.shape[1] > 1)  # a kernel of one channel is a depthwise one


def _differs(base: Tensor | None, tuned: Tensor) -> bool:
    return base is None or not torch.equal(base.to(tuned.dtype), tuned)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _part_of(key: str, modules: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in modules)
