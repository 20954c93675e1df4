"""The mistakes a user can make, one class each; every message says what was found, where, and what to do."""

from collections.abc import Sequence


class VisloraError(Exception):
    """A mistake in what was asked for, told in one sentence; the commands print it and exit with code 2."""


class ConfigError(VisloraError):
    """A setting, or a combination of settings, that can't be run."""


class SweepError(ConfigError):
    """What holds for every run of a sweep; any other mistake may be that of one run's settings."""


class DataError(VisloraError):
    """Images, labels or splits that are missing, unreadable or inconsistent."""


class ModelError(VisloraError):
    """A model or its weights that can't be built, found or adapted."""


class AdapterError(VisloraError):
    """An adapter that is malformed, dead, or doesn't fit the model."""


class TrainingError(VisloraError):
    """A run that can't go on."""


def first_line(error: Exception) -> str:
    """Of what an error says; nothing, of a bare assertion."""
    return str(error).strip().partition("\n")[0]


def first_three(names: Sequence[str]) -> str:
    """Of some names, and how many more there are, for such a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
