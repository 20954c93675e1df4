"""Where the files that travel with the package are: beside it in a checkout, inside it in an installed wheel."""

import os
from pathlib import Path

from vislora.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
_ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent

CONF = _ROOT / "conf"
RECIPES = _ROOT / "recipes"
ASSETS = _ROOT / "assets"


def user_path(path: str | Path) -> Path:
    """A path as a user gives it: ~ is the home folder, where there is one of that name."""
    return Path(os.path.expanduser(path))  # pathlib's own raises RuntimeError for a user whom nobody knows


def absolute(path: str | Path) -> str:
    """A user's path as it is from any folder."""
    return str(user_path(path).absolute())


def cache_dir() -> Path:
    """The folder for downloads and everything that can be made again: $VISLORA_CACHE, or ~/.cache/vislora.

    Raises:
        ConfigError: there is neither, as in a container whose user has no name.
    """
    try:
        return Path(os.environ.get("VISLORA_CACHE") or Path.home() / ".cache" / "vislora")
    except RuntimeError:
        raise ConfigError("there is no home folder for the cache; set VISLORA_CACHE=FOLDER") from None
