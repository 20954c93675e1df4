"""What a user can do about a mistake, in one sentence, where Hydra, OmegaConf and the system tell in several lines."""

import errno
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb

from hydra.errors import MissingConfigException, OverrideParseException

from vislora.config.schemas import WITH_GROUP, groups_of, known_keys, options_of
from vislora.errors import ConfigError
from vislora.paths import CONF, PACKAGE, RECIPES, cache_dir

_PYTHONS_FORMAT = warnings.formatwarning

# Where a user's path leads, or what is left of the disk, at any time
_OF_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_OF_DISKS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)

_ELSEWHERE = {  # what PEFT, timm, accelerate and diffusers' scripts call what is here
    "learning_rate": "lr",
    "r": "rank",
    "network_dim": "rank",
    "lora_alpha": "alpha",
    "network_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "modules_to_save": "trained",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "mixed_precision": "precision",
    "resume_from_checkpoint": "resume",
    "max_grad_norm": "clip_norm",
    "wd": "weight_decay",
    "num_workers": "workers",
    "pretrained": "weights",
    "checkpoint_path": "weights",
    "snr_gamma": "min_snr_gamma",
    "train_data_dir": "root",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}


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
        return ConfigError(
            f"{found[1]} is chosen already; to change it write {found[1]}=… without the +, and in a recipe "
            f"`- override /{found[1]}: …`"
        )
    if found := re.search(r"Could not override 'recipe/(\w+)@", text):
        return ConfigError(f"a recipe chooses another {found[1]} with a slash before it: `- override /{found[1]}: …`")
    if found := re.search(r"Could not override '(\w+)@recipe\.", text):
        return ConfigError(f"a recipe that overrides {found[1]} has to begin with the line `# @package _global_`")
    if found := re.search(r"Could not override '([^']+)'", text):
        if f"full_key: {found[1]}." in str(error.__cause__):  # a table, whose own keys are the user's
            return ConfigError(f"{found[1]} has no such entry yet; write +{found[1]}=… to add it")
        return unknown_key(found[1], name)
    if found := re.search(r"Ambiguous value for argument '(.+?)'\n", text):
        key = found[1].partition("=")[0]
        if key == "recipe" or (CONF / key).is_dir():
            return ConfigError(f"{found[1]} are several; choose one, or add --multirun to run with each in turn")
        return ConfigError(
            f"{found[1]!r} has commas: put a text in quotes, '{key}=\"…\"', or a list in brackets, '{key}=[…]'; "
            "--multirun runs with each in turn"
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
        having = _options_with(found[3])
        return ConfigError(
            f"recipe={found[1]} sets {found[3]}, which the chosen {group} doesn't have; leave out {group}=…, or choose "
            f"one that has it ({', '.join(having)}), in a recipe by `- override /{group}: {having[0]}`"
        )
    if found := re.search(r"In 'recipe/([^']+)': .*config:\s+(.+?)\s+full_key: (\w\S*)", text):
        return ConfigError(f"recipe={found[1]} sets {found[3]} to what can't be there: {found[2]}")
    if found := re.search(r"In '(\w+)/(\w+)_schema': .*Merge error: \w+ is not a subclass of", text, re.DOTALL):
        return ConfigError(f"{found[1]}={found[2]} is not for this command")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(str(error.missing_cfg_file), error.options or [])
    if "LexerNoViableAlt" in repr(error) or isinstance(error, OverrideParseException):
        word = str(getattr(error, "override", None))
        if re.fullmatch(r"\w+", word) and (RECIPES / f"{word}.yaml").is_file():
            return ConfigError(f"{word} is no setting; did you mean recipe={word}?")
        if os.path.exists(word):  # Path's own exists() raises over a very long one
            meant = f"data=imagefolder data.root={word}" if name in WITH_GROUP else f"adapter={word}"
            return ConfigError(f"{word} is no setting; did you mean {meant}?")
        return ConfigError(
            f"can't read the override {word!r}; write key=value, and in lists quote what isn't in plain letters, as "
            "['grün']"
        )
    return ConfigError(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _unknown_option(file: str, options: Sequence[str]) -> ConfigError:
    """That a group has no such option; `file` is GROUP/OPTION."""
    group, _, option = file.rpartition("/")
    inner = group.removeprefix("recipe/")
    if group != inner and (CONF / inner).is_dir():  # which Hydra looks for below the recipe's own group
        return ConfigError(f"a recipe chooses {inner}={option} as `- override /{inner}: {option}`")
    if group != inner:
        return ConfigError(
            f"recipe={inner}/{option}: expected a recipe's name; --config-dir FOLDER tells the folder that holds "
            "recipe/NAME.yaml"
        )
    known = [one for one in options if not one.endswith("schema")]
    known = known or sorted(path.stem for path in (RECIPES if group == "recipe" else CONF / group).glob("*.yaml"))
    near = get_close_matches(option, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"{group}={option} is not known{meant or ';'} {group} can be: {', '.join(known)}")


def unknown_word(word: str, name: str) -> ConfigError:
    """That the command `name` has no such option, as --epochs, and which setting may have been meant."""
    key = word.lstrip("-").partition("=")[0].replace("-", "_")
    known = known_keys(name)
    meant = key if key in known else _meant(key, known)
    hint = "--cfg job prints the settings there are" if meant is None else f"did you mean {meant}=…?"
    return ConfigError(f"there is no option {word.partition('=')[0]}; settings are given as key=value: {hint}")


def unknown_key(key: str, name: str) -> ConfigError:
    """That the command `name` has no such setting, and which one may have been meant."""
    known = known_keys(name)
    if key in known:
        group = key.partition(".")[0]
        return ConfigError(
            f"unknown key {key}, which the chosen {group} doesn't have; choose one that does with {group}=…: "
            + ", ".join(_options_with(key))
        )
    if "out" not in known and re.fullmatch(r"out(put)?(_?(dir|folder))?", key):
        hint = "the folder of the run is hydra.run.dir=FOLDER"  # a name that nobody guesses
    elif (near := _meant(key, known)) is not None:
        hint = f"did you mean {near}?"
    elif "." not in key and (group := get_close_matches(key, groups_of(name), n=1)):
        hint = f"did you mean {group[0]}=OPTION?"
    else:
        hint = "`--cfg job` prints the keys there are"
    return ConfigError(f"unknown key {key}; {hint}")


def _meant(key: str, known: Sequence[str]) -> str | None:
    """The setting that a wrong name is likely to be for: one that other programs call so, one that is called so in
    another group, or one that is written nearly alike."""
    group, _, last = key.rpartition(".")
    settings = [other for other in known if not any(further.startswith(f"{other}.") for further in known)]
    for wanted in (_ELSEWHERE.get(last), last):
        called = [other for other in settings if other.rpartition(".")[2] == wanted]
        called = [other for other in called if other.rpartition(".")[0] == group] or called
        if len(called) == 1:
            return called[0]
    beside = [other.rpartition(".")[2] for other in settings if other.rpartition(".")[0] == group]
    if group and beside:
        near = [f"{group}.{other}" for other in get_close_matches(last, beside, n=1)]
    else:
        near = get_close_matches(key, settings, n=1)
    return near[0] if near else None


def _options_with(key: str) -> list[str]:
    """The options of a setting's group that have it."""
    group, setting = key.split(".")[:2]
    return options_of(group, lambda schema: setting in {field.name for field in fields(schema)})


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
