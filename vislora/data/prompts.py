"""Prompts to draw, from a file or from a command line, each with the class it should show, where that is known."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vislora.data.cache import content_key
from vislora.data.captions import clean
from vislora.data.rows import json_lines, text_lines
from vislora.errors import ConfigError, DataError
from vislora.paths import user_path

NEUTRAL = (
    "a red apple on a wooden table",
    "a house with a green door",
    "a bicycle leaning against a wall",
    "a mountain lake under a clear sky",
    "a cup of coffee",
    "a portrait of a man with a hat",
)
"""What an adapter of a style or a subject has no reason to draw otherwise."""


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and the name of the class that the picture should show."""

    text: str
    label: str | None = None


def read_prompts(given: str | Sequence[str], key: str) -> list[Prompt]:
    """Prompts from a text file with one a line, `prompt` or `prompt | label`, where a line that starts with # is a
    remark; from a .jsonl file with {"prompt": …, "label": …} a line; or from a list of such prompts as a text file has.

    Args:
        key: the setting they come from, for messages.

    Raises:
        ConfigError: neither a file nor a list of texts.
        DataError: there is none, one comes twice, or a line is malformed.
    """
    if isinstance(given, str):
        file = user_path(given)
        if not os.path.isfile(file):  # Path's own raises over a very long text
            raise ConfigError(f"{key}={given}: there is no such file; write a list as {key}=['a prompt','another one']")
        found = list(_from_jsonl(file) if file.suffix == ".jsonl" else _from_text(file))
    elif isinstance(given, Sequence) and all(isinstance(line, str) for line in given):
        found = [_prompt(line, f"{key}, line {number}") for number, line in enumerate(given, 1) if line.strip()]
    else:
        raise ConfigError(f"{key}={given}: expected a file, or a list of texts; quote what YAML takes for a number")
    if not found:
        raise DataError(f"{key}={given} holds no prompt")
    texts = [prompt.text for prompt in found]
    if twice := next((text for i, text in enumerate(texts) if text in texts[:i]), None):
        raise DataError(f"{key}={given}: {twice!r} comes twice, and would be the same pictures twice; take more seeds")
    return found


def noise_seed(seed: int, prompt: str) -> int:
    """The seed of a picture's noise where each prompt is to have noise of its own, whatever else is drawn;
    `python -m vislora.generate seeds=[…]` takes it too."""
    return int(content_key(seed, prompt)[:12], 16)


def _from_text(file: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text_lines(file), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _prompt(line, f"{file}, line {number}")


def _prompt(line: str, at: str) -> Prompt:
    text, bar, label = line.rpartition("|")
    return Prompt(clean(text, at), clean(label, f"{at}: the label")) if bar else Prompt(clean(line, at))


def _from_jsonl(file: Path) -> Iterator[Prompt]:
    for at, row in json_lines(file):
        label = row.get("label") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not isinstance(label, str | None):
            raise DataError(f'{at}: expected {{"prompt": "…"}} or {{"prompt": "…", "label": "…"}}')
        yield Prompt(clean(row["prompt"], at), None if label is None else clean(label, f"{at}: the label"))
