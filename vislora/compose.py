"""From a command line, or a Python call, to one checked configuration; no heavy import happens here.

Hydra composes conf/ and recipes/ against the classes of `vislora.config`. A recipe is an option of the `recipe` group,
placed last in the defaults list, so that it overrides the groups before it and the command line overrides it. A user's
own recipes come with Hydra's `--config-dir DIR`, holding recipe/NAME.yaml.
"""

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

from hydra import __version__ as hydra_version
from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vislora.config.adapter import FullAdapter, LoraAdapter, PipelineLora, ProbeAdapter
from vislora.config.commands import (
    BlendConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    GenerateConfig,
    PredictConfig,
    ResizeConfig,
    UsedAdapters,
)
from vislora.config.data import DATA_OPTIONS
from vislora.config.model import ModelConfig, PipelineConfig
from vislora.config.training import (
    DiffusionObjective,
    LoggerConfig,
    OptimConfig,
    RecognitionObjective,
    TrainConfig,
    TrainerConfig,
)
from vislora.config.values import literal
from vislora.errors import ConfigError, TrainingError, VisloraError
from vislora.files import holds_checkpoint
from vislora.paths import CONF, PACKAGE, RECIPES, cache_dir

_SCHEMAS = [
    (None, "train_schema", TrainConfig),
    (None, "evaluate_schema", EvaluateConfig),
    (None, "predict_schema", PredictConfig),
    (None, "export_schema", ExportConfig),
    (None, "generate_schema", GenerateConfig),
    (None, "extract_schema", ExtractConfig),
    (None, "resize_schema", ResizeConfig),
    (None, "blend_schema", BlendConfig),
    (None, "doctor_schema", DoctorConfig),
    ("model", "schema", ModelConfig),
    ("model", "pipeline_schema", PipelineConfig),
    *(("data", f"{option}_schema", schema) for option, schema in DATA_OPTIONS.items()),
    ("adapter", "lora_schema", LoraAdapter),
    ("adapter", "pipeline_lora_schema", PipelineLora),
    ("adapter", "probe_schema", ProbeAdapter),
    ("adapter", "full_schema", FullAdapter),
    ("objective", "recognition_schema", RecognitionObjective),
    ("objective", "diffusion_schema", DiffusionObjective),
    ("optim", "schema", OptimConfig),
    ("trainer", "schema", TrainerConfig),
    ("logger", "schema", LoggerConfig),
]

_HYDRA = tuple(int(part) for part in hydra_version.split(".")[:2])
_BASE = {"version_base": "1.3"} if _HYDRA < (1, 4) else {}  # of which 1.4 warns, as 1.3 does where it is missing

_WITH_GROUP = ("train", "preflight")  # commands with the settings of training, whose adapter=… is a config group
_PYTHONS_FORMAT = warnings.formatwarning
# Where a user's path leads, or what is left of the disk, at any time
_OF_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_OF_DISKS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG)


def command(name: str, body: Callable[[Any, Path], object], argv: list[str] | None = None) -> None:
    """Run `python -m vislora.<name>`: compose conf/<name>.yaml with the command line, call body(config, run folder). A
    sweeper may go by its answer.

    A mistake in the configuration, any VisloraError of the body, or a file that may not be used is told in one
    sentence, and the process exits with code 2.
    """
    words = sys.argv[1:] if argv is None else argv
    _register(words)
    warnings.formatwarning = _formatted
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, where it would print a page and exit with code 1
    if "-h" in words or "--help" in words:
        tell(_help(name, body.__globals__["__doc__"]))
        return
    rest, adapter = _take_adapter(name, words)
    # Hydra's parser gives up on overrides on both sides of an option, as in `recipe=NAME --multirun optim.lr=…`
    overrides = get_args_parser().parse_intermixed_args(rest).overrides
    sys.argv[1:] = [*(word for word in rest if word not in overrides), *map(_readable, overrides)]

    def run(config: DictConfig) -> object:
        out = Path(HydraConfig.get().runtime._get_node("output_dir")._value())  # as it is: ${x} may be part of its name
        try:
            return body(_typed(config, adapter, name), out)
        except TrainingError as error:
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                _refuse(error)
            print(f"vislora: {out}: {error}", file=sys.stderr)
            raise  # to the sweeper: other settings may do
        except VisloraError as error:
            _refuse(error)
        except OSError as error:
            if not _is_of_files(error):
                _end_if_unread(error)
                raise
            _refuse(_explained(error, name))
        except KeyboardInterrupt:
            _stop(f"; go on with trainer.resume={out}" if holds_checkpoint(out) else "")
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
    except (ConfigError, TrainingError) as error:
        _refuse(error)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _refuse(_explained(error, name))
    except OSError as error:
        if not _is_of_files(error):
            _end_if_unread(error)
            raise
        _refuse(_explained(error, name))
    except ValueError as error:
        if not _is_of_hydra(error):
            raise
        _refuse(_explained(error, name))
    except KeyboardInterrupt:
        _stop()


def configure(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration that `python -m vislora.<name> OVERRIDES` would run with, as its class in `vislora.config`.

    Raises:
        ConfigError: an unknown key or option, a wrong type, or a value that is missing.
    """
    _register(overrides)
    _check_words(name, overrides)
    try:
        with initialize_config_dir(str(CONF), **_BASE):
            words, adapter = _take_adapter(name, overrides)
            config = compose(name, [*map(_readable, words)])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise _explained(error, name) from error
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


def _readable(override: str) -> str:
    """The override as Hydra can read it: a plain value that its grammar has no way to read, as grün or a(1), in quotes;
    there a leading ~ is the home folder, which shells leave to the command. So is a folder called 2024_05_01, which it
    would read as the number 20240501."""
    key, _, value = override.partition("=")
    if not value or value.startswith(("[", "{", "'", '"')):
        return override
    try:
        read = _read(override)
    except HydraException:
        return f"{key}={quoted(os.path.expanduser(value))}"
    return f"{key}={quoted(value)}" if "_" in value and isinstance(read, int | float) else override


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
    more = "With --cfg job it prints every setting that it would run with; vislora/config/ says what each means."
    parts = [about.strip(), "\n".join(options), more]
    return "\n\n".join(filter(None, parts))


def _register(words: Sequence[str]) -> None:
    # OmegaConf 2.4 calls it what in 2.3, which Hydra 1.3 is for, is the name of an older one
    register = OmegaConf.register_new_resolver if _HYDRA < (1, 4) else OmegaConf.register_resolver
    register("or", lambda one, other: one or other, replace=True)  # for names of run folders
    store = ConfigStore.instance().store if _HYDRA < (1, 4) else partial(ConfigStore.instance().store, replace=True)
    for group, name, schema in _SCHEMAS:
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


def _take_adapter(name: str, words: Sequence[str]) -> tuple[list[str], str | list[str] | None]:
    """The words for Hydra, and the folder, or [folders], after `adapter=`. Hydra takes any `adapter=…` for the config
    group of that name, which only training has; a path needs no quotes this way, either."""
    if name in _WITH_GROUP:
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
    if name not in _WITH_GROUP and len(given) > 1:
        raise ConfigError(f"{' '.join(given)}: adapter is given twice; several are adapter=[FOLDER,FOLDER]")
    for word in words:  # as of an unset shell variable: it would be the current folder, or one adapter less
        if name not in _WITH_GROUP and re.fullmatch(r"out=|adapter=(\[(.*,)?\s*,.*\]|\[.*,\s*\])?", word):
            raise ConfigError(f"{word} is empty in one place; give a file or a folder there")
    settings_of_it = [word for word in words if word.lstrip("+").startswith("data.")]
    if name == "evaluate" and settings_of_it and not any(word.lstrip("+").startswith("data=") for word in words):
        raise ConfigError(f"{settings_of_it[0]} is a setting of a data set, and none is chosen; give data=OPTION too")
    groups = {"recipe", *(group for group, _, _ in _SCHEMAS)} - (set() if name in _WITH_GROUP else {"adapter"})
    for word in words:
        key, _, value = word.partition("=")
        with suppress(HydraException):  # of which composing tells
            if key.lstrip("+") in groups and value and isinstance(_read(_readable(word)), int | float | None):
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
            raise _unknown_key(f"{prefix}{key}", name)
        child = config._get_node(key)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)):
            _check_keys(child, f"{prefix}{key}.", name)
        elif f"{prefix}{key}" == "sets":
            for one in child:
                _check_keys(child._get_node(one), f"sets.{one}.", name)


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of vislora's own in one line, without the place in the source that other packages' have."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"vislora: {message}\n"
    return _PYTHONS_FORMAT(message, category, filename, lineno, line)


def _refuse(error: VisloraError) -> None:
    # of what a DataLoader's worker raises torch makes an error of that class, whose text is a traceback
    told = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()
    print(f"vislora: {told}", file=sys.stderr)
    sys.exit(2)


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


def _explained(error: Exception, name: str) -> ConfigError:
    """One sentence for what Hydra, OmegaConf and the file system tell in several lines."""
    text = str(error)
    if _is_of_files(error):
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
        return _unknown_key(found[1], name)
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
        if found[3] not in _known_keys(name):
            return ConfigError(f"recipe={found[1]} sets an {_unknown_key(found[3], name)}")
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


def _is_of_files(error: Exception) -> bool:
    return isinstance(error, _OF_PATHS) or (isinstance(error, OSError) and error.errno in _OF_DISKS)


def _is_of_hydra(error: Exception) -> bool:
    """Whether Hydra raised it, as it does for options that exclude each other, with no class of its own, or in reading
    a file."""
    modules = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return [name for name in modules if name != "codecs"][-1].startswith("hydra.")


def _unknown_key(key: str, name: str) -> ConfigError:
    known = _known_keys(name)
    near = get_close_matches(key, known, n=1)
    if "out" not in known and re.fullmatch(r"out(put)?(_?(dir|folder))?", key):
        hint = "the folder of the run is hydra.run.dir=FOLDER"  # a name that nobody guesses
    elif near and near[0] != key:
        hint = f"did you mean {near[0]}?"
    else:
        hint = "`--cfg job` prints the keys there are"
    elsewhere = f", which the chosen {key.partition('.')[0]} doesn't have" if key in known else ""
    return ConfigError(f"unknown key {key}{elsewhere}; {hint}")


def options_of(group: str, fits: Callable[[type], bool]) -> list[str]:
    """The options of a group whose settings are of a class that fits."""
    schemas = {name: schema for of, name, schema in _SCHEMAS if of == group}
    files = sorted((CONF / group).glob("*.yaml"))
    return [file.stem for file in files if fits(schemas[OmegaConf.load(file).defaults[0]])]


def _known_keys(name: str) -> list[str]:
    """Of the command, and of the groups' options, chosen or not."""
    own = "train_schema" if name in _WITH_GROUP else f"{name}_schema"
    keys = []
    for group, option, schema in _SCHEMAS:
        if group is None and option != own:
            continue
        for f in fields(schema):
            key = f"{group}.{f.name}" if group else f.name
            nested = [f"{key}.{g.name}" for g in fields(f.type)] if is_dataclass(f.type) else []
            keys += [key, *nested]
    return keys
