"""The projections of timm's vision transformers.

A family is one row in `_ATTENTION`: the class of its attention module, and where q, k, v and o are in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from timm.layers import Attention, Mlp
from torch import nn

from vislora.errors import AdapterError
from vislora.lora import TargetLayer
from vislora.lora.layers import Rows

PROJECTIONS = ("qkv", "q", "k", "v", "o", "mlp")


@dataclass(frozen=True)
class _FusedQkv:
    """q, k and v as equal thirds of one layer's rows, o as another layer."""

    qkv: str
    o: str

    def layers(self, attention: nn.Module, wanted: set[str]) -> list[TargetLayer]:
        found = []
        if chosen := [name for name in "qkv" if name in wanted]:
            height = getattr(attention, self.qkv).weight.shape[0] // 3
            rows: Rows = tuple(("qkv".index(name) * height, ("qkv".index(name) + 1) * height) for name in chosen)
            found.append(TargetLayer(self.qkv, rows))
        elif "qkv" in wanted:
            found.append(TargetLayer(self.qkv))
        if "o" in wanted:
            found.append(TargetLayer(self.o))
        return found


_ATTENTION: dict[type[nn.Module], _FusedQkv] = {
    Attention: _FusedQkv(qkv="qkv", o="proj"),
}
_MLP: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1", "fc2"),
}


def find_targets(
    model: nn.Module, projections: Sequence[str], blocks: Sequence[int] | None = None
) -> list[TargetLayer]:
    """The layers that hold the chosen projections.

    Args:
        model: a timm model.
        projections: any of `PROJECTIONS`. On a fused layer, `qkv` is one pair over all its rows; `q`, `k` and `v` each
            get a pair of their own on their third of the rows.
        blocks: indices of the attention blocks in the order of the model, negative ones from the end; None: all.

    Raises:
        AdapterError: an unknown projection, `qkv` together with a part of it, a block that isn't there, or attention or
            MLP modules of a family without a row here.
    """
    wanted = set(projections)
    if unknown := sorted(wanted - set(PROJECTIONS)):
        raise AdapterError(f"unknown projections {', '.join(unknown)}; choose from {', '.join(PROJECTIONS)}")
    if not wanted:
        raise AdapterError(f"no projections to adapt; choose from {', '.join(PROJECTIONS)}")
    if "qkv" in wanted and wanted & {"q", "k", "v"}:
        raise AdapterError("adapt either qkv as a whole or its parts q, k, v; not both")
    attentions = _attentions(model)
    found = []
    for index in _chosen(blocks, len(attentions)):
        path, attention = attentions[index]
        found += [_at(path, layer) for layer in _ATTENTION[type(attention)].layers(attention, wanted)]
        if "mlp" in wanted:
            found += _mlp_layers(model, path)
    return found


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    known, foreign = [], set()
    for path, module in model.named_modules():
        if type(module) in _ATTENTION:
            known.append((path, module))
        elif "Attention" in type(module).__name__ or isinstance(module, nn.MultiheadAttention):
            foreign.add(type(module).__qualname__)
    if foreign:
        raise AdapterError(
            f"{type(model).__name__} holds attention of a family without targets yet: {', '.join(sorted(foreign))}; "
            f"known: {', '.join(sorted(cls.__qualname__ for cls in _ATTENTION))}"
        )
    if not known:
        raise AdapterError(f"{type(model).__name__} holds no attention to adapt")
    return known


def _chosen(blocks: Sequence[int] | None, count: int) -> list[int]:
    if blocks is None:
        return list(range(count))
    if wrong := [b for b in blocks if not -count <= b < count]:
        raise AdapterError(f"block {wrong[0]} isn't there; the model has {count}, 0 to {count - 1} or -{count} to -1")
    return sorted({b % count for b in blocks})


def _mlp_layers(model: nn.Module, attention_path: str) -> list[TargetLayer]:
    parent = attention_path.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        if type(module) in _MLP:
            return [_at(f"{parent}.{name}", TargetLayer(layer)) for layer in _MLP[type(module)]]
    raise AdapterError(
        f"{parent} has no MLP of a known class beside its attention ({', '.join(c.__name__ for c in _MLP)}); "
        "leave mlp out of the targets"
    )


def _at(path: str, layer: TargetLayer) -> TargetLayer:
    return TargetLayer(f"{path}.{layer.name}", layer.rows)
