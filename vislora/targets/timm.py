"""The projections of timm models, of open_clip's towers and of torch's own attention.

`vislora.targets.families` has a row for each family.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn

from vislora.errors import AdapterError
from vislora.lora import TargetLayer
from vislora.lora.adaptable import unlike_a_product
from vislora.lora.dora import DoraConv2d
from vislora.lora.layers import LoraConv2d
from vislora.lora.names import inside, submodule
from vislora.targets.blocks import Blocks, choose_blocks
from vislora.targets.families import ATTENTION, GATES
from vislora.targets.layouts import QKV, Held, in_order

PROJECTIONS = ("qkv", *QKV, "o", "mlp", "conv")

_ATTENTION_CLASS = re.compile(r"Attn|Attention|MSA$|MHA$")
_ATTENTION_LAYERS = ({"qkv"}, {"q", "k", "v"}, {"q_proj", "k_proj"}, {"to_q", "to_k"}, {"query", "key"})
_MLP_CLASS = re.compile(r"Mlp|MLP|GLU|FFN|MBConv$")
_MLP_NAMES = ("mlp", "ffn")
_LAYERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)


def find_targets(
    model: nn.Module, projections: Sequence[str], blocks: Blocks = None, trained: Collection[str] = ()
) -> list[TargetLayer]:
    """The layers that hold the chosen projections, in the order of the model.

    `q`, `k`, `v` and `o` are the projections of attention, `qkv` the first three together: on a fused layer one pair
    over all their rows, where `q`, `k` and `v` get pairs of their own on their rows (one for each head, in families
    that keep heads outside q, k and v). What some of the chosen blocks don't have is adapted in the others. `mlp`
    stands for the Linear layers and convolutions of the feed-forward modules in the blocks, `conv` for every other
    convolution: of the chosen blocks, or of the whole model where all are. Convolutions that are grouped, depthwise,
    dilated or computed in timm's own way (`same` padding, standardised weights) belong to neither.

    Args:
        model: a timm model, or any with attention of the classes in `vislora.targets.families`.
        projections: any of `PROJECTIONS`.
        blocks: which of the blocks that hold attention (without any: that hold feed-forward modules), see
            `vislora.targets.blocks.Blocks`. Attention outside all blocks (a pooling head) goes with the block before.
        trained: modules that are trained in full; layers in them are left out.

    Raises:
        AdapterError: an unknown projection, one that no chosen block has, `qkv` together with a part of it, a block
            that isn't there, or attention of a family without a row.
    """
    wanted = _checked(projections)
    attentions = _attentions(model)
    if not attentions and not set(wanted) <= {"mlp", "conv"}:
        raise AdapterError(
            f"{type(model).__name__} holds no attention to adapt; adapt its feed-forward layers and convolutions "
            "(mlp, conv)"
        )
    by_block = _blocks(model, attentions or _mlps(model, "", ()))
    names = list(by_block)
    chosen = [names[index] for index in choose_blocks(blocks, names)]
    held = {path: attentions[path] for block in chosen for path in by_block[block] if attentions}
    found: list[TargetLayer] = []
    for projection in wanted:
        layers = [_at(path, target) for path, module in held.items() for target in _of_attention(module, projection)]
        if projection == "mlp":
            layers += [TargetLayer(name) for block in chosen for name in _mlp_layers(model, block, attentions)]
        if projection == "conv":
            layers += [TargetLayer(name) for name in _other_convolutions(model, chosen, blocks, by_block, attentions)]
        if not layers and (chosen or not by_block):
            raise AdapterError(_told_missing(model, projection, held))
        if other := [one.name for one in layers if not isinstance(submodule(model, one.name), _LAYERS)]:
            kind = type(submodule(model, other[0])).__name__
            raise AdapterError(
                f"{projection} of {other[0]} is a {kind}, which can't be adapted; leave {projection} out"
            )
        found += layers
    return [layer for layer in in_order(model, found) if not any(inside(layer.name, name) for name in trained)]


def attention_classes(model: nn.Module) -> tuple[str, ...]:
    """The attention classes of a model, sorted, by the names that `vislora.targets.families` has them under.

    Raises:
        AdapterError: attention of a family without a row.
    """
    return tuple(sorted({_family(module) for module in _attentions(model).values()}))


def available(model: nn.Module) -> tuple[str, ...]:
    """Those of q, k, v, o, mlp and conv that `find_targets` finds in a model."""

    def has(projection: str) -> bool:
        try:
            return bool(find_targets(model, [projection]))
        except AdapterError:
            return False

    return tuple(projection for projection in PROJECTIONS[1:] if has(projection))


def _checked(projections: Sequence[str]) -> list[str]:
    if isinstance(projections, str):
        raise AdapterError(f"projections={projections!r}: expected a list, [{projections!r}]")
    wanted = [name for name in PROJECTIONS if name in projections]
    if unknown := sorted(set(projections) - set(PROJECTIONS)):
        raise AdapterError(f"unknown projections {', '.join(unknown)}; choose from {', '.join(PROJECTIONS)}")
    if not wanted:
        raise AdapterError(f"no projections to adapt; choose from {', '.join(PROJECTIONS)}")
    if "qkv" in wanted and set(wanted) & set(QKV):
        raise AdapterError("adapt either qkv as a whole or its parts q, k, v; not both")
    return wanted


def _at(path: str, layer: TargetLayer) -> TargetLayer:
    return TargetLayer(f"{path}.{layer.name}" if layer.name else path, layer.rows)


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules by path; one that looks like attention and isn't known is an error."""
    known, suspects = {}, {}
    for path, module in model.named_modules():
        if _layout(module):
            known[path] = module
        elif _looks_like_attention(module):
            suspects[path] = module
    foreign = {
        _class_name(type(module))
        for path, module in suspects.items()
        if not any(inside(path, other) or inside(other, path) for other in known)
    }
    if foreign:
        raise AdapterError(
            f"{type(model).__name__} holds attention of a family without targets yet: {', '.join(sorted(foreign))}; "
            "a row in vislora/targets/families.py tells where its projections are"
        )
    return known


def _family(module: nn.Module) -> str | None:
    """The first class among a module's own and its bases that has a row."""
    return next((name for name in map(_class_name, type(module).__mro__) if name in ATTENTION), None)


def _layout(module: nn.Module) -> Sequence[Held]:
    return ATTENTION.get(_family(module), ())


def _looks_like_attention(module: nn.Module) -> bool:
    if any(_class_name(cls) in GATES for cls in type(module).__mro__):
        return False
    children = {name for name, _ in module.named_children()}
    return bool(_ATTENTION_CLASS.search(type(module).__name__)) or any(names <= children for names in _ATTENTION_LAYERS)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _of_attention(attention: nn.Module, projection: str) -> Iterator[TargetLayer]:
    for held in _layout(attention):
        yield from held.targets(attention, projection)


def _told_missing(model: nn.Module, projection: str, held: dict[str, nn.Module]) -> str:
    there: dict[str, set[str]] = {}
    for module in held.values():
        parts = {part for layer in _layout(module) for _ in layer.layers(module) for part in layer.parts}
        there.setdefault(type(module).__name__, set()).update(parts)
    has = "; ".join(f"{name} has {', '.join(sorted(parts))}" for name, parts in there.items()) or "no attention"
    return f"{type(model).__name__} has no {projection} in the chosen blocks ({has}); leave it out of the targets"


def _blocks(model: nn.Module, attentions: Iterable[str]) -> dict[str, list[str]]:
    """Paths of attention modules by the path of their block.

    A block is the nearest module around them whose class is called so, or else the one that holds them.
    """
    blocks: dict[str, list[str]] = {}
    for attention in attentions:
        path = attention
        while path and not re.search(r"(?<!Residual)Block$", type(model.get_submodule(path)).__name__):
            path = path.rpartition(".")[0]
        path = path or attention.rpartition(".")[0]
        if not path:  # in no block
            path = list(blocks)[-1] if blocks else attention
        blocks.setdefault(path, []).append(attention)
    return blocks


def _mlp_layers(model: nn.Module, block: str, attentions: Iterable[str]) -> Iterator[str]:
    """Linear layers and convolutions of the feed-forward modules in a block, or of the one that follows it."""
    parent, _, name = block.rpartition(".")
    following = f"{parent}.{int(name) + 1}" if name.isdigit() else None
    found = list(_mlps(model, block, attentions))
    if not found and following and _MLP_CLASS.search(type(submodule(model, following)).__name__):
        found = [following]
    for path in found:
        for inner, layer in model.get_submodule(path).named_modules():
            if isinstance(layer, nn.Linear) or _adaptable_convolution(layer):
                yield f"{path}.{inner}" if inner else path


def _mlps(model: nn.Module, block: str, attentions: Iterable[str]) -> Iterator[str]:
    held = [path for path in attentions if inside(path, block)]
    taken: list[str] = []
    for name, module in model.get_submodule(block).named_modules():
        path = f"{block}.{name}" if block else name
        if not name or any(inside(path, other) for other in [*held, *taken]):
            continue
        if any(inside(attention, path) for attention in held):
            continue
        if _MLP_CLASS.search(type(module).__name__) or name.rpartition(".")[2] in _MLP_NAMES:
            taken.append(path)
            yield path


def _other_convolutions(
    model: nn.Module,
    chosen: list[str],
    blocks: Blocks,
    by_block: dict[str, list[str]],
    attentions: dict[str, nn.Module],
) -> Iterator[str]:
    projections = {
        _at(path, TargetLayer(name)).name
        for path, module in attentions.items()
        for held in _layout(module)
        for name, _ in held.layers(module)
    }
    mlps = {name for block in by_block for name in _mlp_layers(model, block, attentions)}
    for path, layer in model.named_modules():
        in_scope = blocks is None or any(inside(path, block) for block in chosen)
        if in_scope and _adaptable_convolution(layer) and path not in projections | mlps:
            yield path


def _adaptable_convolution(layer: nn.Module) -> bool:
    return type(layer) in (nn.Conv2d, LoraConv2d, DoraConv2d) and unlike_a_product(layer) is None
