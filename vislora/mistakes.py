"""What a user can do about a mistake, in one sentence, where Hydra, OmegaConf and the system tell in several lines."""

import errno
import re
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb

from hydra.errors import MissingConfigException, OverrideParseException

from vislora.config.schemas import known_keys
from vislora.errors import ConfigError
from vislora.paths import PACKAGE, cache_dir

_PYTHONS_FORMAT = warnings.formatwarning

# Where a user's path leads, or what is left of the disk, at any time
_OF_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_OF_DISKS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)


def explained(error: Exception, name: str) -> ConfigError:
    """What such an error of the command `name` comes to for a user."""
    text = str(error)
    if is_of_files(error):
        told = f"{error.filename or 'a file'} can't be used: {error.strerror or error}"
        with suppress(ConfigError):  # where there is no cache
            if Path(str(error.filename)).is_relative_to(cache_dir()):
                told += "; VISLORA_CACHE=FOLDER puts the cache elsewhere"
        return ConfigError(told)
    if isinstance(error, UnicodeDecodeError):
        number = error.object.count(b"\n", 0, error.start) + 1
        return ConfigError(f"line {number} of a recipe, or of an option, isn't in UTF-8: {text}; save it as UTF-8")
    if found := re.search(r"An item is already at '([^']+)'", text):
        return ConfigError(f"{found[1]} is there already; write {found[1]}=… without the + to change it")
    if found := re.search(r"Multiple values for (\w+)\. To override", text):
        return ConfigError(f"{found[1]} is chosen already; write {found[1]}=… without the + to change it")
    if found := re.search(r"Could not override '(\w+)@recipe\.", text):
        return ConfigError(f"a recipe that overrides {found[1]} has to begin with the line `# @package _global_`")
    if found := re.search(r"Could not override '([^']+)'", text):
        if f"full_key: {found[1]}." in str(error.__cause__):  # a table, whose own keys are the user's
            return ConfigError(f"{found[1]} has no such entry yet; write +{found[1]}=… to add it")
        return unknown_key(found[1], name)
    if found := re.search(r"Ambiguous value for argument '(.+?)'\n", text):
        key = found[1].partition("=")[0]
        return ConfigError(
            f"{found[1]!r} has commas: put a text in quotes, '{key}=\"…\"', or a list in brackets, '{key}=[…]'"
        )
    if found := re.search(r"Error merging override (.+)", text):
        if "is not a ListConfig" in str(error.__cause__):
            key, _, value = found[1].partition("=")
            return ConfigError(f"{found[1]} can't be used: expected a list, {key}=[{value}]")
        cause = str(error.__cause__ or "").splitlines()
        return ConfigError(f"{found[1]} can't be used: {cause[0] if cause else 'wrong type'}")
    if found := re.search(r"'recipe/([^']+)' is validated against ConfigStore schema with the same name", text):
        return ConfigError(f"recipe={found[1]} is vislora's own; give your recipe of that name another one")
    if found := re.search(r"In 'recipe/([^']+)': .*Key '(\w+)' not in.*full_key: (\S+)", text, re.DOTALL):
        group = found[3].partition(".")[0]
        if group == "recipe":
            return ConfigError(f"recipe={found[1]} has to begin with the line `# @package _global_`")
        if found[3] not in known_keys(name):
            return ConfigError(f"recipe={found[1]} sets an {unknown_key(found[3], name)}")
        return ConfigError(
            f"recipe={found[1]} sets {found[3]}, which the chosen {group} doesn't have; leave out {group}=…, or take "
            "another recipe"
        )
    if found := re.search(r"In 'recipe/([^']+)': .*config:\s+(.+?)\s+full_key: (\w\S*)", text):
        return ConfigError(f"recipe={found[1]} sets {found[3]} to what can't be there: {found[2]}")
    if found := re.search(r"In '(\w+)/(\w+)_schema': .*Merge error: \w+ is not a subclass of", text, re.DOTALL):
        return ConfigError(f"{found[1]}={found[2]} is not for this command")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [o for o in error.options or [] if not o.endswith("schema")]
        return ConfigError(f"{group}={option} is not known; {group} can be: {', '.join(options) or 'nothing here'}")
    if "LexerNoViableAlt" in repr(error) or isinstance(error, OverrideParseException):
        return ConfigError(
            f"can't read the override {getattr(error, 'override', None)!r}; write key=value, and in lists quote what "
            "isn't in plain letters, as ['grün']"
        )
    return ConfigError(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def unknown_key(key: str, name: str) -> ConfigError:
    """That the command `name` has no such setting, and which one may have been meant."""
    known = known_keys(name)
    near = get_close_matches(key, known, n=1)
    if "out" not in known and re.fullmatch(r"out(put)?(_?(dir|folder))?", key):
        hint = "the folder of the run is hydra.run.dir=FOLDER"  # a name that nobody guesses
    elif near and near[0] != key:
        hint = f"did you mean {near[0]}?"
    else:
        hint = "`--cfg job` prints the keys there are"
    elsewhere = f", which the chosen {key.partition('.')[0]} doesn't have" if key in known else ""
    return ConfigError(f"unknown key {key}{elsewhere}; {hint}")


def is_of_files(error: Exception) -> bool:
    """Whether a user's files or disk are at fault."""
    return isinstance(error, _OF_PATHS) or (isinstance(error, OSError) and error.errno in _OF_DISKS)


def is_of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it, as it does for options that exclude each other, with no class of its own, or in reading
    a file."""
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return [name for name in modules if name != "codecs"][-1].startswith("hydra.")


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of vislora's own in one line, without the place in the source that other packages' have."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"vislora: {message}\n"
    return _PYTHONS_FORMAT(message, category, filename, lineno, line)
