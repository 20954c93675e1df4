"""Settings as JSON values, and texts that OmegaConf leaves as they are."""

import re
from typing import Any

from omegaconf import OmegaConf


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as JSON values."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def literal(value: Any) -> Any:
    """A value in which texts mean themselves: to OmegaConf ${x} in one stands for another setting."""
    if isinstance(value, dict):
        return {key: literal(own) for key, own in value.items()}
    if isinstance(value, list):
        return [literal(own) for own in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
