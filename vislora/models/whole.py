"""Models whose every weight comes from their files, and tokenizers that know their words.

diffusers and transformers draw a weight that no file holds at random, and say so in their logs alone; of a tokenizer
without its files transformers makes one to which all words are the same unknown one.
"""

from pathlib import Path
from typing import Any

from torch import nn

from vislora.errors import ModelError, first_three


def open_whole(cls: type[nn.Module], source: str, **options: Any) -> nn.Module:
    """What `cls.from_pretrained` makes of a folder or a name on the hub, from safetensors alone.

    Raises:
        ModelError: a weight of the model is in no file.
    """
    model, found = cls.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        where, library = Path(source, options.get("subfolder", "")), cls.__module__.partition(".")[0]
        raise ModelError(
            f"{where}: no file holds {first_three(missing)} of {cls.__name__}; fetch the model again, or open it with "
            f"a {library} as new as the one that saved it"
        )
    return model


def check_vocabulary(cls: type, folder: Path) -> None:
    """Refuse a folder that holds no words for a tokenizer of the class.

    Raises:
        ModelError: neither tokenizer.json nor all of the files that stand for it are there.
    """
    names = dict(cls.vocab_files_names)
    in_one = [names.pop("tokenizer_file")] if "tokenizer_file" in names else []
    choices = [choice for choice in (in_one, list(names.values())) if choice]
    if choices and not any(all((folder / name).is_file() for name in choice) for choice in choices):
        needed = ", or ".join(" and ".join(choice) for choice in choices)
        raise ModelError(f"{folder} needs {needed}, without which a {cls.__name__} knows no word; fetch it again")
