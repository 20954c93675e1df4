"""What numbers may be, said in one way."""

import math
from typing import Any

from vislora.errors import ConfigError


def check_ranges(config: Any, group: str = "", **ranges: tuple[float, float]) -> None:
    """Refuse numbers that aren't finite or out of range, both ends of which are allowed; None stands for no number."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{group}{name}={value}: expected a finite number")
        if value is not None and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ConfigError(f"{group}{name}={value}: expected {expected}")


def check_shares(config: Any, group: str, *names: str) -> None:
    """Refuse what isn't a share that leaves something; None stands for no number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value < 1.0:
            raise ConfigError(f"{group}{name}={value}: expected 0 to below 1")
