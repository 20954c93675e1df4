"""What things are called in tables and messages."""

from pathlib import Path

from vislora.errors import ConfigError


def short_names(folders: list[str]) -> list[str]:
    """A name for each folder: its own, or the run's it is in, with as much before it as tells them apart.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = [Path(folder).absolute() for folder in folders]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ConfigError(f"adapter: {twice[0]} is named twice")
    names = ends([path.parent if path.name in ("adapter", "model") else path for path in paths])
    return names if len({*names}) == len(names) else [str(path) for path in paths]  # RUN/adapter and RUN/model


def without_middle(name: str, kept: int) -> str:
    """So many letters of a name, half of them from either end: classes often differ at their ends alone."""
    return f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"


def ends(paths: list[Path]) -> list[str]:
    """As much of the end of each path as tells them all apart."""
    names: list[str] = []
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len({*names}) == len(names):
            break
    return names
