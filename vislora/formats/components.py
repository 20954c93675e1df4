"""The names that a pipeline's adapter has in files.

An adapter of a diffusion pipeline is one `Adapter` whose layers are named by component and module, as
`unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q` or `text_encoder.text_model.encoder.layers.0.mlp.fc1`.
CLIP's layers lie below `text_model` in files, and in models before transformers 5.6, which took that level away.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version

import torch

from vislora.errors import AdapterError
from vislora.lora import Adapter, LowRankWeights
from vislora.targets.diffusers import FUSED

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

# Where layers without a component belong, by the first word of their names: adapters of a model, not of a pipeline.
_BARE = {
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding"), "unet"),
    **dict.fromkeys(
        ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder"), "transformer"
    ),
    "text_model": "text_encoder",
}
_LEVEL, _CLIP = "text_model.", re.compile(r"encoder\.layers\.\d+(\.(self_attn|mlp|layer_norm[12])(\.|$)|$)")


def is_pipelines(adapter: Adapter) -> bool:
    """Whether the layers are named by component, so that the adapter is a pipeline's and not a single model's."""
    return all(name.partition(".")[0] in COMPONENTS for name in adapter.layers)


def named_by_component(adapter: Adapter, otherwise: str | None = None) -> Adapter:
    """The adapter with the names of files, which begin with a component; a single model's gets the one that some of its
    layers can only belong to, or else `otherwise`.

    Raises:
        AdapterError: a name that tells no component, or a layer that is there by two names.
    """
    otherwise = only_component(adapter.layers) or otherwise
    return _renamed(adapter, lambda name: with_component(name, otherwise))


def of_component(adapter: Adapter, component: str) -> Adapter:
    """A single model's adapter in the names of files, as one of this component of a pipeline."""
    return _renamed(adapter, lambda name: with_component(f"{component}.{name}"))


def only_component(names: Iterable[str]) -> str | None:
    """The component that a single model's layers belong to, told by those that can belong to one alone; None where they
    tell none, or several."""
    told = {_BARE.get(name.partition(".")[0], "text_encoder" if _CLIP.match(name) else None) for name in names}
    told.discard(None)
    return told.pop() if len(told) == 1 else None


def tell_no_component(names: Iterable[str]) -> bool:
    """Whether layers are those of a single model, of which no name tells which component of a pipeline it is."""
    return all(name.partition(".")[0] not in COMPONENTS and only_component([name]) is None for name in names)


def with_component(name: str, otherwise: str | None = None) -> str:
    """A layer's name in files: a component before it, its own, the only one that it can belong to, or `otherwise`; and
    CLIP's level.

    Raises:
        AdapterError: a name that tells no component.
    """
    first, _, module = name.partition(".")
    if first.startswith("text_encoder") and _CLIP.match(module):
        return f"{first}.{_LEVEL}{module}"
    if first in COMPONENTS:
        return name
    if _CLIP.match(name):
        return f"text_encoder.{_LEVEL}{name}"
    if (component := _BARE.get(first, otherwise)) is not None:
        return f"{component}.{name}"
    raise AdapterError(
        f"{name} names no component of a diffusion pipeline ({', '.join(COMPONENTS)}); the adapter is another's"
    )


def as_in_files(adapter: Adapter) -> Adapter:
    """The same function in the names and shapes that other programs read: those of files, one pair a layer, and
    separate layers where the model had fused theirs."""
    layers: dict[str, LowRankWeights] = {}
    for name, weights in named_by_component(adapter).layers.items():
        component, _, module = name.partition(".")
        parent, _, last = module.rpartition(".")
        if last in FUSED:
            height, rest = divmod(weights.out, len(FUSED[last]))
            # as of grouped queries
            if rest or any(stop - start != height for start, stop in weights.rows or ()):
                raise AdapterError(
                    f"{name} stacks layers of unequal heights, which no format has; fuse no projections to adapt them"
                )
            for part, own in zip(FUSED[last], _unfused(weights.as_one_pair(), height), strict=True):
                if own.lora_B.any() or own.magnitude is not None:
                    layers[f"{component}.{parent}.{part}"] = own
        else:
            layers[f"{component}.{module}"] = weights.as_one_pair()
    if not layers:
        raise AdapterError("the adapter is untrained: nothing is left of fused layers whose lora_B is zero")
    return replace(adapter, layers=layers)


def of_models(adapter: Adapter) -> dict[str, Adapter]:
    """An adapter for each component, in the names of its model as transformers makes it here.

    From 5.6 on CLIPTextModel, the first text encoder of Stable Diffusion 1, 2 and XL and of Flux, is without the level
    that the second of XL and those of Stable Diffusion 3, with their projections, keep.
    """
    parts = by_component(adapter)
    of_sd3 = "transformer" in parts and "text_encoder_2" in parts
    if "text_encoder" in parts and not of_sd3 and tuple(map(int, version("transformers").split(".")[:2])) >= (5, 6):
        parts["text_encoder"] = _renamed(parts["text_encoder"], lambda name: name.removeprefix(_LEVEL))
    return parts


def by_component(adapter: Adapter) -> dict[str, Adapter]:
    """An adapter for each component, in the names of files."""
    named = named_by_component(adapter)
    found: dict[str, Adapter] = {}
    for kind in ("layers", "trained", "biases"):
        for name, value in getattr(named, kind).items():
            component, _, module = name.partition(".")
            part = found.setdefault(component, replace(adapter, layers={}, trained={}, biases={}))
            getattr(part, kind)[module] = value
    return found


def _renamed(adapter: Adapter, rename: Callable[[str], str]) -> Adapter:
    """The adapter with what it holds under other names; an AdapterError where two things get one."""
    named: dict[str, dict] = {"layers": {}, "trained": {}, "biases": {}}
    for kind, found in named.items():
        for name, value in getattr(adapter, kind).items():
            if found.setdefault(own := rename(name), value) is not value:
                raise AdapterError(f"the adapter has {own} by two names; which one counts?")
    return replace(adapter, **named)


def _unfused(weights: LowRankWeights, height: int) -> list[LowRankWeights]:
    """One pair for each part of a stacked layer: B's own rows, and of A the ranks that they use."""
    found = []
    for start in range(0, weights.out, height):
        b = weights.lora_B[start : start + height]
        used = b.flatten(1).any(0) if b.any() else b.new_ones(weights.rank, dtype=torch.bool)
        rank = int(used.sum())
        magnitude = None if weights.magnitude is None else weights.magnitude[start : start + height]
        found.append(
            LowRankWeights(weights.lora_A[used], b[:, used], rank, weights.scale * rank, height, magnitude=magnitude)
        )
    return found
