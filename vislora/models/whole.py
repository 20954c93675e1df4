"""Models whose every weight comes from their files.

diffusers and transformers draw a weight that no file holds at random, and say so in their logs alone.
"""

from pathlib import Path
from typing import Any

from torch import nn

from vislora.errors import ModelError, first_three


def open_whole(cls: type[nn.Module], source: str, **options: Any) -> nn.Module:
    """What `cls.from_pretrained` makes of a folder or a name on the hub, from safetensors alone.

    Raises:
        ModelError: a weight of the model is in no file.
    """
    model, found = cls.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where, library = Path(source, options.get("subfolder", "")), cls.__module__.partition(".")[0]
        raise ModelError(
            f"{where}: no file holds {first_three(missing)} of {cls.__name__}; fetch the model again, or open it with "
            f"a {library} as new as the one that saved it"
        )
    return model
