"""From a command line, or a Python call, to one checked configuration; no heavy import happens here.

Hydra composes conf/ and recipes/ against the classes of `vislora.config`. A recipe is an option of the `recipe` group,
placed last in the defaults list, so that it overrides the groups before it and the command line overrides it. A user's
own recipes come with Hydra's `--config-dir DIR`, holding recipe/NAME.yaml.
"""

import os
import re
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import __version__ as hydra_version
from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vislora.config.commands import UsedAdapters
from vislora.config.schemas import SCHEMAS, WITH_GROUP, known_keys
from vislora.config.values import literal
from vislora.errors import ConfigError, SweepError, VisloraError
from vislora.files import holds_checkpoint
from vislora.mistakes import explained, format_warning, is_of_files, is_of_hydra, unknown_key, unknown_word
from vislora.paths import CONF, RECIPES

_HYDRA = tuple(int(part) for part in hydra_version.split(".")[:2])
_BASE = {"version_base": "1.3"} if _HYDRA < (1, 4) else {}  # of which 1.4 warns, as 1.3 does where it is missing


def command(name: str, body: Callable[[Any, Path], object], argv: list[str] | None = None) -> None:
    """Run `python -m vislora.<name>`: compose conf/<name>.yaml with the command line, call body(config, run folder). A
    sweeper may go by its answer.

    A mistake in the configuration, any VisloraError of the body, or a file that may not be used is told in one
    sentence, and the process exits with code 2.
    """
    words = sys.argv[1:] if argv is None else argv
    _register(words)
    warnings.formatwarning = format_warning
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, where it would print a page and exit with code 1
    if "-h" in words or "--help" in words:
        tell(_help(name, body.__globals__["__doc__"]))
        return
    rest, adapter = _take_adapter(name, words)
    parser = get_args_parser()
    if odd := [word for word in rest if re.match("--?[A-Za-z]", word) and not _is_option(word, parser)]:
        _refuse(unknown_word(odd[0], name))
    # Hydra's parser gives up on overrides on both sides of an option, as in `recipe=NAME --multirun optim.lr=…`
    overrides = parser.parse_intermixed_args(rest).overrides
    sys.argv[1:] = [*(word for word in rest if word not in overrides), *(_readable(word, name) for word in overrides)]

    def run(config: DictConfig) -> object:
        out = Path(HydraConfig.get().runtime._get_node("output_dir")._value())  # as it is: ${x} may be part of its name
        try:
            sources = HydraConfig.get().runtime.config_sources
            own = [Path(source.path) / "recipe" for source in sources if source.schema == "file"]
            _check_chosen(config, HydraConfig.get().overrides.task, [*own, RECIPES])
            return body(_typed(config, adapter, name), out)
        except VisloraError as error:
            if HydraConfig.get().mode is not RunMode.MULTIRUN or isinstance(error, SweepError):
                _refuse(error)
            print(f"vislora: {out}: {_told(error)}", file=sys.stderr)
            raise  # to the sweeper: other settings may do
        except OSError as error:
            if not is_of_files(error):
                _end_if_unread(error)
                raise
            _refuse(explained(error, name))
        except KeyboardInterrupt:
            _stop(f"; the same command with trainer.resume={out} goes on" if holds_checkpoint(out) else "")
        finally:
            # Hydra makes the folder at once: it stays empty after a refusal, and in all processes but the first
            if out != Path.cwd() and out.is_dir() and not any(out.iterdir()):
                out.rmdir()

    try:
        _check_words(name, words)
        if any(word.lstrip("+~").startswith(("-", "hydra")) for word in words):
            hydra_main(**_BASE, config_path=str(CONF), config_name=name)(run)()
        else:  # as hydra.main, but composed once: that does it again, and only then tells of a mistake
            with initialize_config_dir(str(CONF), job_name=name, **_BASE):
                GlobalHydra.instance().hydra.run(name, run, sys.argv[1:])
        sys.stdout.flush()  # here, where an error is told; Python does it later
    except VisloraError as error:
        _refuse(error)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _refuse(explained(error, name))
    except OSError as error:
        if not is_of_files(error):
            _end_if_unread(error)
            raise
        _refuse(explained(error, name))
    except ValueError as error:
        if not is_of_hydra(error):
            raise
        _refuse(explained(error, name))
    except KeyboardInterrupt:
        _stop()


def _is_option(word: str, parser: ArgumentParser) -> bool:
    """Whether it is an option of Hydra, with its value or without, or short for one."""
    known, given = parser._option_string_actions, word.partition("=")[0]
    return given in known or given[:2] in known or any(one.startswith(given) for one in known if word[:2] == "--")


def configure(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration that `python -m vislora.<name> OVERRIDES` would run with, as its class in `vislora.config`.

    Raises:
        ConfigError: an unknown command, key or option, a wrong type, or a value that is missing.
    """
    if name not in (commands := sorted(path.stem for path in CONF.glob("*.yaml"))):
        raise ConfigError(f"there is no command {name!r}; there is {', '.join(commands)}")
    _register(overrides)
    _check_words(name, overrides)
    try:
        with initialize_config_dir(str(CONF), **_BASE):
            words, adapter = _take_adapter(name, overrides)
            config = compose(name, [_readable(word, name) for word in words])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise explained(error, name) from error
    _check_chosen(config, words, [RECIPES])
    return _typed(config, adapter, name)


def tell(text: str) -> None:
    """Print a text; where nobody reads the standard output any more, as behind `| head`, end without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError as error:
        _end_if_unread(error)


def quoted(text: str) -> str:
    """A text as one value for Hydra, which would take commas, brackets and much else apart."""
    return QuotedString(literal(text), Quote.single).with_quotes()


def _readable(override: str, name: str) -> str:
    """The override as Hydra can read it: a plain value that its grammar has no way to read, as grün or a(1), in quotes;
    there a leading ~ is the home folder, which shells leave to the command. So is what it would take for a number, or
    for true or false, where a text is expected: a folder may be called 1.10, 1e3 or 2024_05_01. The values of a plain
    list, or those of a sweep, are treated alike."""
    key, _, value = override.partition("=")
    is_list = value[:1] + value[-1:] == "[]"
    ones = [one.strip() for one in (value[1:-1] if is_list else value).split(",")]
    plain = all(one and not set(one) & set("[]{}'\"\\") for one in ones)
    try:
        read = _read(override)
    except HydraException:
        if is_list and plain:
            return f"{key}=[{','.join(quoted(os.path.expanduser(one)) for one in ones)}]"
        end = {"": "", "[": "]", "{": "}", "'": "'", '"': '"'}.get(value[:1])
        if end is not None and (value.endswith(end) or end not in value):  # another mistake, to be told
            return override
        return f"{key}={quoted(os.path.expanduser(value))}"
    if not plain or "(" in value:
        return override
    found = read if is_list else read.list if isinstance(read, ChoiceSweep) else [read]
    kept = [quoted(one) if _is_text(key, seen, one, name) else one for one, seen in zip(ones, found, strict=True)]
    if kept == ones:
        return override
    return f"{key}=[{','.join(kept)}]" if is_list else f"{key}={','.join(kept)}"


def _is_text(key: str, read: Any, value: str, name: str) -> bool:
    """Whether it was read as a number, or as true or false, and the setting is a text."""
    if not isinstance(read, int | float):
        return False
    key = key.lstrip("+")
    if key.startswith("hydra."):  # whose settings are texts, or have one way to write them
        return not isinstance(read, bool) and str(read) != value
    kind = known_keys(name).get(re.sub(r"^sets\.[^.]+\.", "data.", key))
    return kind in (str, str | None, list[str], list[str] | None) or (kind is Any and "_" in value)  # a file's name


def _read(override: str) -> Any:
    """The value in it, as Hydra reads it."""
    return OverridesParser.create().parse_override(override).value()


def _help(name: str, about: str) -> str:
    """What a command's file says of it, and the options of the groups that it is composed of."""
    options = []
    for entry in OmegaConf.load(CONF / f"{name}.yaml").defaults:
        for group in entry if isinstance(entry, DictConfig) else ():
            folder = RECIPES if group == "recipe" else CONF / group
            if folder.is_dir():
                options.append(f"  {group}={'|'.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    but = "" if name in WITH_GROUP or "adapter" not in known_keys(name) else " but adapter=…"
    more = f"With --cfg job it prints every setting{but} that it would run with; vislora/config/ says what each means."
    parts = [about.strip(), "\n".join(options), more]
    return "\n\n".join(filter(None, parts))


def _register(words: Sequence[str]) -> None:
    # OmegaConf 2.4 calls it what in 2.3, which Hydra 1.3 is for, is the name of an older one
    register = OmegaConf.register_new_resolver if _HYDRA < (1, 4) else OmegaConf.register_resolver
    register("or", lambda one, other: one or other, replace=True)  # for names of run folders
    store = ConfigStore.instance().store if _HYDRA < (1, 4) else partial(ConfigStore.instance().store, replace=True)
    for group, name, schema in SCHEMAS:
        store(name=name, node=schema, group=group)
    chosen = _chosen(words)
    for path in sorted(RECIPES.glob("*.yaml")):
        store(name=path.stem, node=_beside(OmegaConf.load(path), chosen), group="recipe", package="_global_")


def _chosen(words: Sequence[str]) -> dict[str, tuple[str, DictConfig]]:
    """The options on the command line, as model=embedded, and what they say; by their group."""
    found = {}
    for word in words:
        option = re.fullmatch(r"""(\w+)=(['"]?)(\w+)\2""", word)
        # Path's own is_file raises over a very long word
        if option and os.path.isfile(file := CONF / option[1] / f"{option[3]}.yaml"):
            found[option[1]] = (option[3], OmegaConf.load(file))
    return found


def _beside(recipe: DictConfig, chosen: dict[str, tuple[str, DictConfig]]) -> DictConfig:
    """A recipe without what the options that are chosen in place of its own say themselves: its values come last, and
    would take the place of theirs."""
    for group, (option, said) in chosen.items():
        if group in recipe and {f"override /{group}": option} not in recipe.defaults:
            for key in [key for key in recipe[group] if key in said and not OmegaConf.is_missing(said, key)]:
                del recipe[group][key]
    return recipe


def _check_chosen(config: DictConfig, words: Sequence[str], recipes: Sequence[Path]) -> None:
    """Refuse a config in which a recipe's values stand over those of an option that was chosen in place of its own: as
    of a user's own recipe, or where a sweep goes through several options, which `_beside` doesn't see."""
    given = [word.lstrip("+").partition("=")[0] for word in words]
    own = _choices(next((word[7:] for word in words if word.startswith("recipe=")), ""), recipes)
    for group, (option, said) in _chosen(words).items():
        if own.get(group) == option:
            continue
        values = OmegaConf.to_container(config[group], enum_to_str=True)
        for key, value in OmegaConf.to_container(said).items():
            whole = f"{group}.{key}"
            if key == "defaults" or OmegaConf.is_missing(said, key) or values[key] == value:
                continue
            if not any(word == whole or word.startswith(f"{whole}.") for word in given):
                raise ConfigError(
                    f"{group}={option} means {whole}={value}, over which the recipe puts {values[key]}; add "
                    f"{whole}=… to say which one it is to be"
                )


def _choices(recipe: str, folders: Sequence[Path]) -> dict[str, str]:
    """The options that a recipe, and those that it builds on, chooses; by group."""
    found: dict[str, str] = {}
    file = next((file for folder in folders if (file := folder / f"{recipe}.yaml").is_file()), None)
    for entry in [] if file is None else OmegaConf.load(file).get("defaults", []):
        if isinstance(entry, str):
            found |= _choices(entry, folders)
        else:
            found |= {key.removeprefix("override /"): option for key, option in entry.items()}
    return found


def _take_adapter(name: str, words: Sequence[str]) -> tuple[list[str], str | list[str] | None]:
    """The words for Hydra, and the folder, or [folders], after `adapter=`. Hydra takes any `adapter=…` for the config
    group of that name, which only training has; a path needs no quotes this way, either."""
    if name in WITH_GROUP:
        return list(words), None
    given = [os.path.expanduser(word.removeprefix("adapter=")) for word in words if word.startswith("adapter=")]
    rest = [word for word in words if not word.startswith("adapter=")]
    if given and given[-1].startswith("[") and given[-1].endswith("]"):
        folders = re.findall(r"""\s*(?:'[^']*'|"[^"]*"|[^,]+)""", given[-1][1:-1])
        return rest, [os.path.expanduser(folder.strip(" '\"")) for folder in folders if folder.strip()]
    if given and name == "evaluate":  # one, or several
        return rest, given[-1:]
    return rest, given[-1] if given else None


def _check_words(name: str, words: Sequence[str]) -> None:
    """Refuse a second adapter=…, in the place of which Hydra would forget the first; paths that are empty; settings of
    a data set where none is chosen, over which it would fail an assertion; and null or a number as the option of a
    group, likewise."""
    given = [word for word in words if word.startswith("adapter=")]
    if name not in WITH_GROUP and len(given) > 1:
        raise ConfigError(f"{' '.join(given)}: adapter is given twice; several are adapter=[FOLDER,FOLDER]")
    for word in words:  # as of an unset shell variable: it would be the current folder, or one adapter less
        if name not in WITH_GROUP and re.fullmatch(r"out=|adapter=(\[(.*,)?\s*,.*\]|\[.*,\s*\])?", word):
            raise ConfigError(f"{word} is empty in one place; give a file or a folder there")
    settings_of_it = [word for word in words if word.lstrip("+").startswith("data.")]
    if name == "evaluate" and settings_of_it and not any(word.lstrip("+").startswith("data=") for word in words):
        raise ConfigError(f"{settings_of_it[0]} is a setting of a data set, and none is chosen; give data=OPTION too")
    groups = {"recipe", *(group for group, _, _ in SCHEMAS)} - (set() if name in WITH_GROUP else {"adapter"})
    for word in words:
        key, _, value = word.partition("=")
        with suppress(HydraException):  # of which composing tells
            if key.lstrip("+") in groups and value and isinstance(_read(_readable(word, name)), int | float | None):
                raise ConfigError(f"{word}: expected the name of an option; leave {key} out for what it is by default")


def _typed(config: DictConfig, adapter: str | list[str] | None, name: str) -> Any:
    """The dataclasses behind a composed config; a missing value and a key smuggled in with `+` are refused."""
    if adapter is not None:
        several = adapter if isinstance(adapter, list) else [adapter]
        try:
            if _adapter_type(config) is UsedAdapters:
                config.adapter.files = several
            else:
                config.adapter = adapter
        except OmegaConfBaseException:
            raise ConfigError(f"adapter={adapter}: this command takes {_one_or_several(config)}") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        how = "pictures or folders" if missing[0] == "images" else f"{missing[0]}=…"
        raise ConfigError(f"{missing[0]} has no value; give it on the command line: {how}")
    _check_keys(config, "", name)
    return OmegaConf.to_object(config)


def _one_or_several(config: DictConfig) -> str:
    several = _adapter_type(config) == list[str]
    return "several adapters, adapter=[FOLDER,FOLDER]" if several else "one adapter's folder"


def _adapter_type(config: DictConfig) -> Any:
    return OmegaConf.get_type(config).__dataclass_fields__["adapter"].type


def _check_keys(config: DictConfig, prefix: str, name: str) -> None:
    known = [f.name for f in fields(OmegaConf.get_type(config))]
    for key in config:
        if key not in known:
            raise unknown_key(f"{prefix}{key}", name)
        child = config._get_node(key)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)):
            _check_keys(child, f"{prefix}{key}.", name)
        elif f"{prefix}{key}" == "sets":
            for one in child:
                _check_keys(child._get_node(one), f"sets.{one}.", name)


def _refuse(error: VisloraError) -> None:
    print(f"vislora: {_told(error)}", file=sys.stderr)
    sys.exit(2)


def _told(error: VisloraError) -> str:
    """What it says: of what a DataLoader's worker raises torch makes an error of that class, whose text is a
    traceback."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


def _stop(more: str = "") -> None:
    print(f"\nvislora: stopped{more}", file=sys.stderr)
    sys.exit(130)  # as shells have it


def _end_if_unread(error: OSError) -> None:
    """End without a word where the error is that nobody reads the standard output any more, as behind `| head`."""
    if not isinstance(error, BrokenPipeError):
        return
    try:
        print(flush=True)  # it may be another pipe that broke, as of a worker
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail to write the rest
        sys.exit(141)  # as shells have it
