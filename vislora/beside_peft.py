"""PEFT's adapters on the same layers, where it is installed."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vislora.errors import first_line
from vislora.lora import TargetLayer

_REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError)


def in_peft(
    model: nn.Module, targets: list[TargetLayer], count_dead: Callable[[nn.Module, list[nn.Parameter]], int]
) -> str | None:
    """What PEFT makes of the targets: "live", "dead: N of M layers", or "refused: …"; None where it isn't installed.

    Args:
        model: is changed by PEFT.
        targets: the layers, each as a whole.
        count_dead: given PEFT's model and all lora_B in it, the number of those that can't move its output.
    """
    try:
        import peft
    except ImportError:
        return None
    try:
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[target.name for target in targets])
        wrapped = peft.get_peft_model(model, config).eval()
        pairs = [p for name, p in wrapped.named_parameters() if name.endswith("lora_B.default.weight")]
        dead = count_dead(wrapped, pairs)
    except _REFUSALS as error:
        return f"refused: {first_line(error)[:120]}"
    return f"dead: {dead} of {len(pairs)} layers" if dead else "live"


@torch.no_grad()
def opened_by_peft(model: nn.Module, folder: Path, images: Tensor) -> Tensor | None:
    """The output of the model, which is changed, with an adapter folder opened by PEFT; None where it refuses, or isn't
    installed."""
    try:
        import peft
    except ImportError:
        return None
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()(images)
    except _REFUSALS:
        return None
