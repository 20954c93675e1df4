"""How the projections of an attention module lie in its layers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vislora.lora import TargetLayer
from vislora.lora.adaptable import form_of
from vislora.lora.low_rank import Rows

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Held:
    """A layer inside an attention module, and the parts that its output rows hold.

    Attributes:
        path: of the layer in the module; "" is the module itself, and a `*` stands for every name.
        parts: q, k, v, o, mlp, or a name for rows that aren't adapted, in the order of the rows.
        heights: rows of each part, given the attention module; equal ones by default. Where they don't add up to the
            layer's rows, they are one head's: the family keeps heads outside q, k and v, and they repeat.
    """

    path: str
    parts: Sequence[str]
    heights: Callable[[nn.Module], Sequence[int]] | None = None

    def layers(self, attention: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Those that are there, by path: some families leave a layer out, or put an Identity in its place."""
        wanted = self.path.split(".")
        for path, layer in attention.named_modules():
            names = path.split(".")
            fits = len(names) == len(wanted) and all(w in ("*", n) for n, w in zip(names, wanted, strict=True))
            if fits and not isinstance(layer, nn.Identity | nn.Sequential):
                yield path, layer

    def targets(self, attention: nn.Module, projection: str) -> Iterator[TargetLayer]:
        """Pairs on one projection: on `qkv` one over all rows of q, k and v; on a part one over its rows (one for each
        head, where heads repeat)."""
        parts = QKV if projection == "qkv" else (projection,)
        for path, layer in self.layers(attention):
            weight = form_of(layer)
            if weight is None or set(self.parts) <= set(parts):  # without one, `adaptable` tells why
                yield TargetLayer(path)
            elif rows := self._rows(attention, weight.shape[0], parts):
                # q, k and v lie side by side
                yield TargetLayer(path, ((rows[0][0], rows[-1][1]),) if projection == "qkv" else rows)

    def _rows(self, attention: nn.Module, out: int, parts: Sequence[str]) -> Rows:
        heights = [out // len(self.parts)] * len(self.parts) if self.heights is None else self.heights(attention)
        rows, start = [], 0
        for _ in range(out // sum(heights)):
            for part, height in zip(self.parts, heights, strict=True):
                if part in parts and height:
                    rows.append((start, start + height))
                start += height
        return tuple(rows)


def in_order(model: nn.Module, targets: list[TargetLayer]) -> list[TargetLayer]:
    """One target a layer, in the model's order; rows that several words asked for side by side."""
    merged: dict[str, TargetLayer] = {}
    for target in targets:
        same = merged.get(target.name, target)
        rows = None if None in (same.rows, target.rows) else tuple(sorted({*same.rows, *target.rows}))
        merged[target.name] = TargetLayer(target.name, rows)
    return [merged[name] for name, _ in model.named_modules() if name in merged]
