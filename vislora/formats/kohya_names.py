"""kohya's names for the layers of Stable Diffusion, to and from a pipeline's.

A name is a prefix and a module's path with _ for every dot. SDXL's UNet has the names of Stability's own code (sgm:
input_blocks, middle_block, output_blocks), which number its blocks through, two residual blocks a level.
"""

import re
from collections.abc import Iterable

from vislora.errors import AdapterError

PREFIXES = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}

# Every word of a module's path. Those that have an underscore themselves come first, to be told apart at the others.
_WORD = re.compile(
    r"""(
    (?:down|up|transformer|input|output)_blocks | mid_block | middle_block | motion_modules | conv_(?:in|out|shortcut)
    | time_embedding | add_embedding | linear_[12] | time_emb_proj | proj_(?:in|out) | to_(?:q|k|v|out)
    | text_model | self_attn | (?:q|k|v|out)_proj | text_projection
    | (?:in|out|emb)_layers | skip_connection | time_embed | label_emb
    | attentions | resnets | (?:down|up)samplers | attn[12] | ff | net | proj | conv[12]? | encoder | layers | mlp
    | fc[12] | op | out | \d+
    )(?:_|$)""",
    re.VERBOSE,
)

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def to_kohya(name: str, sdxl: bool, by_path: bool = False) -> str:
    """`unet.down_blocks.1.attentions.0.proj_in` -> `lora_unet_down_blocks_1_attentions_0_proj_in` (SDXL:
    `lora_unet_input_blocks_4_1_proj_in`).

    Args:
        name: a layer's, as in files.
        sdxl: it is SDXL's.
        by_path: name layers of its UNet by their paths nevertheless.

    Raises:
        AdapterError: a component that the format has no names for.
    """
    component, _, module = name.partition(".")
    if component not in PREFIXES:
        raise AdapterError(
            f"{name}: kohya's format has names for the UNet and the CLIP text encoders of Stable Diffusion, none for "
            f"{component}; write the adapter as diffusers' file"
        )
    prefix = PREFIXES[component][-1 if sdxl else 0]
    if component == "unet" and sdxl and not by_path:
        module = _to_sgm(module)
    return f"{prefix}_{module.replace('.', '_')}"


def numbered_as_sdxl(names: Iterable[str]) -> bool:
    """Whether sgm's numbers fit a UNet's layers as far as they tell: not where a level has one residual block on the
    way down and two on the way up, as in KOALA, or more than SDXL's two and three."""
    last: dict[str, int] = {}
    for name in names:
        if found := re.match(r"unet\.(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last != {"down": 0, "up": 1} and last.get("down", 0) < 2 and last.get("up", 0) < 3


def from_kohya(name: str) -> str:
    """The inverse of `to_kohya`, for either naming of the UNet.

    Raises:
        AdapterError: the name isn't one of Stable Diffusion's.
    """
    for component, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(f"{prefix}_"):
                module = _dotted(name.removeprefix(f"{prefix}_"))
                if component == "unet" and module.startswith(("input_blocks", "middle_block", "output_blocks")):
                    module = _from_sgm(module)
                elif component == "unet":
                    module = {theirs: ours for ours, theirs in _AROUND.items()}.get(module, module)
                return f"{component}.{module}"
    raise AdapterError(f"{name} begins with none of {', '.join(p for ps in PREFIXES.values() for p in ps)}")


def _dotted(flat: str) -> str:
    parts, rest = [], flat
    while rest:
        word = _WORD.match(rest)
        if word is None:
            raise AdapterError(f"{flat} has a part that Stable Diffusion doesn't have: {rest}")
        parts.append(word[1])
        rest = rest[word.end() :]
    return ".".join(parts)


def _to_sgm(module: str) -> str:
    if module in _AROUND:
        return _AROUND[module]
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        way, block, kind, index, rest = found.groups()
        level = 3 * int(block) + int(index)
        start = f"input_blocks.{level + 1}" if way == "down" else f"output_blocks.{level}"
        return f"{start}.{'0' if kind == 'resnets' else '1'}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        kind, index, rest = found.groups()
        place = 2 * int(index) + (0 if kind == "resnets" else 1)
        return f"middle_block.{place}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
        return f"output_blocks.{3 * int(found[1]) + 2}.2.conv"
    raise AdapterError(f"unet.{module}: SDXL's UNet has no layer of this name")


def _from_sgm(module: str) -> str:
    resnet = {theirs: ours for ours, theirs in _RESNET.items()}
    if module == _AROUND["conv_in"]:
        return "conv_in"
    if found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", module):
        return f"down_blocks.{int(found[1]) // 3 - 1}.downsamplers.0.conv"
    if found := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.conv", module):
        return f"up_blocks.{int(found[1]) // 3}.upsamplers.0.conv"
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)", module):
        way, number, kind, rest = found[1], int(found[2]), "resnets" if found[3] == "0" else "attentions", found[4]
        block, index = divmod(number - 1 if way == "input" else number, 3)
        rest = resnet.get(rest, rest) if kind == "resnets" else rest
        return f"{'down' if way == 'input' else 'up'}_blocks.{block}.{kind}.{index}.{rest}"
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", module):
        place, rest = int(found[1]), found[2]
        kind = "attentions" if place == 1 else "resnets"
        return f"mid_block.{kind}.{place // 2}.{resnet.get(rest, rest) if kind == 'resnets' else rest}"
    raise AdapterError(f"{module} is no layer of SDXL's UNet")
