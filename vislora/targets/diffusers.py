"""The projections of diffusers' UNets and transformers, and of the text encoders beside them.

diffusers has over sixty attention classes and few ways to name their layers. So a family is a row of names in
`_ATTENTION` or `_MLP`: a module belongs to it if it has layers of these names. Whether they act, `prove_alive` tells.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from vislora.errors import AdapterError
from vislora.lora import TargetLayer
from vislora.lora.low_rank import Rows
from vislora.lora.names import inside
from vislora.targets.blocks import Blocks, choose_blocks
from vislora.targets.layouts import in_order

PROJECTIONS = ("qkv", "q", "k", "v", "o", "mlp", "proj", "conv")
ATTENTION = ("self", "cross")

_ATTENTION: tuple[dict[str, tuple[str, ...]], ...] = (
    {  # UNets and transformers; add_*_proj and to_add_out are the text's own in joint attention
        "q": ("to_q", "add_q_proj"),
        "k": ("to_k", "add_k_proj"),
        "v": ("to_v", "add_v_proj"),
        "o": ("to_out.0", "to_out", "to_add_out"),
    },
    {"q": ("to_query",), "k": ("to_key",), "v": ("to_value",), "o": ("out_layer",)},  # Kandinsky 5
    {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("out_proj", "o_proj")},  # CLIP; Gemma, Llama, Qwen
    {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o",)},  # T5
    {"q": ("to_qkv_mlp_proj",), "k": ("to_qkv_mlp_proj",), "v": ("to_qkv_mlp_proj",), "o": ("to_out",)},  # Flux 2
)
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""What `fuse_qkv_projections` makes, and the layers whose rows it stacks in there."""

_MLP: tuple[tuple[str, ...], ...] = (
    ("net.0.proj", "net.2"),  # FeedForward
    ("fc1", "fc2"),  # CLIP
    ("gate_proj", "up_proj", "down_proj"),  # Gemma, Llama, Qwen
    ("wi_0", "wi_1", "wo"),  # T5 v1.1
    ("wi", "wo"),  # T5
    ("linear_in", "linear_out"),  # Flux 2
    ("linear_1", "linear_2", "linear_3"),  # Lumina
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("gate", "up", "down"),  # Krea 2
    ("ff_in", "ff_out"),  # MiniMax Music 3
    ("ffn.0", "ffn.2"),  # Wan Animate 2
    ("proj_mlp",),  # single-stream blocks of Flux and its kin, where `o` is the block's proj_out
    ("to_qkv_mlp_proj",),  # those of Flux 2, in the rows below q, k and v
)
_CONV = ("conv1", "conv2", "conv_shortcut", "conv")  # of residual blocks; of down- and upsamplers
# Pool the text for the time embedding; the first through F.multi_head_attention_forward, which reads weights past the
# layers.
_POOLING = ("HunyuanDiTAttentionPool", "MochiAttentionPool")
# Attends from pictures to boxes, and isn't called without them.
_WITH_BOXES = ("GatedSelfAttentionDense",)
# Joint attention to the last block, after which the text is thrown away, though the block doesn't say so.
_TEXT_ENDS = ("QwenImageTransformer2DModel",)


def find_targets(
    model: nn.Module,
    projections: Sequence[str],
    blocks: Blocks = None,
    attention: Sequence[str] = ATTENTION,
) -> list[TargetLayer]:
    """The layers that hold the chosen projections.

    Args:
        model: a UNet or transformer of diffusers, or a text encoder of transformers.
        projections: any of `PROJECTIONS`. `q`, `k`, `v` and `o` are attention's, `qkv` the first three together; after
            `fuse_qkv_projections` they are pairs on rows of the fused layers, with `qkv` one pair over all rows. `mlp`
            is the feed-forward layers, `proj` a UNet's `proj_in` and `proj_out` around its transformer blocks, `conv`
            its residual and resampling convolutions.
        blocks: which of the blocks that hold attention, in the order they run; or parts of the model by module name, as
            `up_blocks.1`, which `proj` and `conv` need.
        attention: `self` (joint attention too), `cross`, or both.

    Raises:
        AdapterError: an unknown word, `qkv` together with a part of it, a block that isn't there, a projection that the
            model lacks, or attention or feed-forward modules of a family without a row here.
    """
    wanted = _checked(projections, PROJECTIONS, "projections")
    kinds = _checked(attention, ATTENTION, "attention")
    if "qkv" in wanted and wanted & {"q", "k", "v"}:
        raise AdapterError("adapt either qkv as a whole or its parts q, k, v; not both")
    if len(kinds) == 1 and wanted <= {"mlp", "proj", "conv"}:
        raise AdapterError(
            f"attention={attention[0]} chooses among the layers of attention, and only {', '.join(sorted(wanted))} is "
            "to be adapted; leave it out"
        )
    attentions = _attentions(model)
    chosen = _chosen(blocks, attentions, model, bool(wanted & {"proj", "conv"}))
    found: dict[str, list[TargetLayer]] = {word: [] for word in sorted(wanted)}

    idle = [name for name, module in model.named_modules() if type(module).__name__ in _WITH_BOXES]

    def within(name: str) -> bool:
        return any(inside(name, part) for part in chosen) and not any(inside(name, part) for part in idle)

    for path, family in attentions.items():
        if within(path) and ("cross" if _is_cross(model, path) else "self") in kinds:
            for word, layers in _attention_layers(model, path, family, wanted).items():
                found[word] += layers
    for word, layers in (("mlp", _mlps), ("proj", _projs), ("conv", _convs)):
        if word in wanted:
            found[word] = [layer for layer in layers(model) if within(layer.name)]
    if missing := [word for word, layers in found.items() if not layers and chosen]:
        kind = "" if len(kinds) > 1 else f" ({attention[0]} attention)"
        raise AdapterError(f"{type(model).__name__} has no {', '.join(missing)} layers there{kind}; leave them out")
    return in_order(model, [layer for layers in found.values() for layer in layers])


def is_fused(attention: nn.Module) -> bool:
    """Whether an attention module of diffusers reads the layer that `fuse_qkv_projections` made, and not `to_q`, …"""
    if not getattr(attention, "fused_projections", False):
        return False
    # the class Attention keeps its flag and the fused layer after unfusing, and changes its processor only
    return hasattr(attention, "unfuse_projections") or type(attention.processor).__name__.startswith("Fused")


def _checked(words: Sequence[str], known: Sequence[str], what: str) -> set[str]:
    if isinstance(words, str):
        raise AdapterError(f"{what}={words!r}: expected a list, [{words!r}]")
    if unknown := sorted(set(words) - set(known)):
        raise AdapterError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    if not words:
        raise AdapterError(f"no {what} to adapt; choose from {', '.join(known)}")
    return set(words)


def _attentions(model: nn.Module) -> dict[str, dict[str, tuple[str, ...]]]:
    """Paths of the attention modules in the order they run, each with its row in `_ATTENTION`."""
    foreign: dict[str, str] = {}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in _POOLING:
            continue
        family = next((row for row in _ATTENTION if all(_present(module, row[word]) for word in "qkv")), None)
        if family is not None:
            found[path] = family
        elif isinstance(module, nn.MultiheadAttention) or _holds_layers(module, "Attention"):
            foreign[path] = type(module).__qualname__
    _refuse_foreign(model, "attention", foreign, found)
    if not found:
        raise AdapterError(f"{type(model).__name__} holds no attention to adapt")
    # UNets register mid_block after up_blocks
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("up_blocks.")))


def _attention_layers(
    model: nn.Module, path: str, family: dict[str, tuple[str, ...]], wanted: set[str]
) -> dict[str, list[TargetLayer]]:
    """The wanted layers of one attention module, by the word that asked for them."""
    attention = model.get_submodule(path)
    split = {word: _present(attention, family[word]) for word in family}
    if getattr(attention, "context_pre_only", False) or _is_at_the_end(model, path.rpartition(".")[0]):
        for word in "qo":  # what these queries attend to is thrown away
            split[word] = [name for name in split[word] if name not in ("add_q_proj", "to_add_out")]
    stacked = _stacked(attention)
    found: dict[str, list[TargetLayer]] = {word: [] for word in wanted & {"qkv", "q", "k", "v", "o"}}
    for word in found:
        for letter in word:
            for name in split[letter]:
                layer, rows = stacked.get((word, name), (name, None))
                found[word].append(TargetLayer(f"{path}.{layer}", rows))
    if "o" in wanted and getattr(attention, "pre_only", False):
        parent = path.rpartition(".")[0]
        found["o"] += [TargetLayer(f"{parent}.{name}") for name in _present(model.get_submodule(parent), ("proj_out",))]
    return found


def _stacked(attention: nn.Module) -> dict[tuple[str, str], tuple[str, Rows]]:
    """Of projections that lie in one layer, by letter (or "qkv") and name: the layer, and their rows of it."""
    found: dict[tuple[str, str], tuple[str, Rows]] = {}
    for layer in _present(attention, tuple(FUSED)) if is_fused(attention) else ():
        start = 0
        for part in FUSED[layer]:
            stop = start + attention.get_submodule(part).out_features
            found[part.removesuffix("_proj")[-1], part] = (layer, ((start, stop),))
            found["qkv", part] = (layer, None)
            start = stop
    for layer in _present(attention, ("to_qkv_mlp_proj",)):
        found["qkv", layer] = (layer, ((0, 3 * attention.inner_dim),))
        for i, letter in enumerate("qkv"):
            found[letter, layer] = (layer, ((i * attention.inner_dim, (i + 1) * attention.inner_dim),))
    return found


def _mlps(model: nn.Module) -> Iterator[TargetLayer]:
    foreign: dict[str, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        if own == "txt_mlp" and _is_at_the_end(model, parent):
            continue
        row = next((row for row in _MLP if len(_present(module, row)) == len(row)), None)
        if row is not None and not type(module).__name__.endswith(("Embedding", "Projection", "Embeddings")):
            found[path] = row
        elif _holds_layers(module, "FeedForward") or _holds_layers(module, "MLP") or _holds_experts(module):
            foreign[path] = type(module).__qualname__
    _refuse_foreign(model, "feed-forward layers", foreign, found)
    for path, row in found.items():
        for name in row:
            layer = model.get_submodule(f"{path}.{name}")
            rows = ((3 * model.get_submodule(path).inner_dim, layer.out_features),) if "qkv" in name else None
            yield TargetLayer(f"{path}.{name}", rows)


def _projs(model: nn.Module) -> Iterator[TargetLayer]:
    for path, module in model.named_modules():
        if path and hasattr(module, "transformer_blocks"):  # the model's own proj_out makes the output, not attention's
            yield from (TargetLayer(f"{path}.{name}") for name in _present(module, ("proj_in", "proj_out")))


def _convs(model: nn.Module) -> Iterator[TargetLayer]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and path.rpartition(".")[2] in _CONV:
            yield TargetLayer(path)


def _present(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the names that are layers of the module."""
    found = []
    for name in names:
        layer = module
        for part in name.split("."):
            layer = getattr(layer, part, None)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found.append(name)
    return found


def _holds_layers(module: nn.Module, word: str) -> bool:
    layers = any(isinstance(child, nn.Linear) for child in module.children())
    return layers and word in type(module).__name__


def _holds_experts(module: nn.Module) -> bool:
    return "Experts" in type(module).__name__ and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _refuse_foreign(model: nn.Module, what: str, foreign: dict[str, str], known: dict) -> None:
    # what lies around a known module is that one's wrapper, as T5LayerSelfAttention around T5Attention
    alien = {name for path, name in foreign.items() if not any(inner.startswith(f"{path}.") for inner in known)}
    if alien:
        raise AdapterError(
            f"{type(model).__name__} holds {what} of a family without targets yet: {', '.join(sorted(alien))}"
        )


def _is_cross(model: nn.Module, path: str) -> bool:
    attention, (parent, _, name) = model.get_submodule(path), path.rpartition(".")
    if type(model.get_submodule(parent)).__name__ == "Kandinsky3AttentionBlock":  # whose Attention says it of all
        return attention.to_k.in_features != attention.to_q.in_features
    if hasattr(attention, "is_cross_attention"):
        return attention.is_cross_attention
    return name.endswith("attn2") or "cross" in name.lower() or "_to_" in name  # as audio_attn2, audio_to_video_attn


def _is_at_the_end(model: nn.Module, block: str) -> bool:
    """Whether what a block makes of the text is thrown away."""
    blocks = getattr(model, "transformer_blocks", ())
    return type(model).__name__ in _TEXT_ENDS and block == f"transformer_blocks.{len(blocks) - 1}"


def _block(model: nn.Module, path: str) -> str:
    """The block that an attention module is in: what its list holds (T5 keeps each half of a block in a list too)."""
    parent = path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), nn.ModuleList):
        return path
    return parent.rpartition(".layer.")[0] if ".layer." in parent else parent


def _chosen(blocks: Blocks, attentions: Iterable[str], model: nn.Module, beyond_attention: bool) -> list[str]:
    """Beginnings of the names of what is chosen."""
    if blocks is None:
        return [""]
    known = list(dict.fromkeys(_block(model, path) for path in attentions))
    names = {name for name, _ in model.named_modules()}
    chosen: list[str] = []
    for block in [blocks] if isinstance(blocks, int | str) else blocks:
        if block in names:
            chosen.append(block)
        elif beyond_attention:
            raise AdapterError(
                f"blocks={block} is no module of {type(model).__name__}, and proj and conv layers aren't chosen by "
                "blocks of attention; give module names"
            )
        else:
            chosen += [known[index] for index in choose_blocks(block, known)]
    return chosen
