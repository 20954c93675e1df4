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
    parts = [(p.parent if p.name in ("adapter", "model") else p).parts for p in paths]
    names = [p[-1] for p in parts]
    while any(names.count(name) > 1 for name in names):
        length = len(Path(names[0]).parts) + 1
        if length > max(map(len, parts)):
            return [str(path) for path in paths]  # RUN/adapter and RUN/model
        names = ["/".join(p[-length:]) for p in parts]
    return names
