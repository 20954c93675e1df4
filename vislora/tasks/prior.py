"""Prior preservation: pictures of the class beside those of the subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vislora.config.data import CaptionedData, CaptionsData
from vislora.data.cache import content_key
from vislora.data.captions import Captioned, CaptionedSplits, captions_folder, clean, picture_files
from vislora.data.order import mix
from vislora.data.splits import Pictures
from vislora.drawing import Sampling, draw
from vislora.errors import DataError, first_three
from vislora.files import replacing
from vislora.models.denoiser import tokenize
from vislora.models.diffusion import model_key, settings_of
from vislora.paths import cache_dir, user_path

_AT_ONCE = 8  # pictures drawn together


def with_prior(
    pipe: Any, splits: CaptionedSplits, data: CaptionedData, device: torch.device
) -> tuple[CaptionedSplits, list[float], list[int]]:
    """The pictures to learn from with the class's among them, the weight of each one's loss, and the picture of each
    showing of an epoch.

    With prior preservation the subject is shown as often as the class. Pictures of the class are drawn by the untuned
    pipeline, and kept in the cache, where `data.prior.images` names no folder of them.

    Raises:
        DataError: the prompt is no caption, or the folder of pictures can't be read or holds some of the subject's.
    """
    train = splits.train
    shown = list(range(len(train))) * data.repeats
    if data.prior.prompt is None:
        return splits, [1.0] * len(train), shown
    prompt = clean(data.prior.prompt, "data.prior.prompt")
    if data.prior.images is not None:
        folder = user_path(data.prior.images)
        picture_files(folder, "data.prior.images")
    else:
        folder = _drawn(pipe, prompt, data, device)
    found = captions_folder(CaptionsData(root=str(folder), prompt=prompt))
    prior = found.train
    own = {name for part in (train, splits.val) if part is not None for name in part.names}
    if twice := [name for name in prior.names if name in own]:  # a folder below data.root is searched there too
        raise DataError(
            f"data.prior.images={folder}: {first_three(twice)} would be learned as the subject too, being found in "
            "data.root; keep the pictures of the class in a folder outside of it"
        )
    count = max(len(shown), len(prior))
    both = Captioned(
        [*train.captions, *prior.captions],
        [*train.names, *prior.names],
        _Joined(train.pictures, prior.pictures, len(train)),
    )
    weights = [1.0] * len(train) + [data.prior.weight] * len(prior)
    subject = [i % len(train) for i in range(count)]
    learned = CaptionedSplits(both, splits.val, [*splits.problems, *found.problems], {**splits.facts, **found.facts})
    return learned, weights, subject + [len(train) + i % len(prior) for i in range(count)]


@dataclass(frozen=True)
class _Joined:
    """One source of pictures, then another."""

    first: Pictures
    second: Pictures
    length: int  # of the first

    def __getitem__(self, index: int) -> Image.Image:
        return self.first[index] if index < self.length else self.second[index - self.length]


def _drawn(pipe: Any, prompt: str, data: CaptionedData, device: torch.device) -> Path:
    """A folder of `data.prior.count` pictures of the prompt by the untuned pipeline; only missing ones are drawn."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    settings = [*settings_of(pipe.config), *settings_of(pipe.scheduler.config)]
    drawn_by = (type(pipe).__name__, type(pipe.scheduler).__name__, *settings, model_key(modules))
    tokens = [rows.numpy().tobytes() for rows in tokenize(pipe, [prompt, ""]).values()]
    steps = min(25, pipe.scheduler.config.num_train_timesteps)
    sampling = Sampling(steps, guidance=5.0, size=data.size and (data.size, data.size))
    key = content_key(prompt, *tokens, repr(sampling), *drawn_by)
    folder = cache_dir() / "prior" / key[:24] / f"{data.prior.count}"
    folder.mkdir(parents=True, exist_ok=True)
    pipe.to(device)
    missing: Sequence[int] = [i for i in range(data.prior.count) if not (folder / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), _AT_ONCE):  # an interrupted run goes on from the last batch
        batch = missing[start : start + _AT_ONCE]
        for number, image in zip(batch, draw(pipe, [(prompt, mix(i)) for i in batch], sampling), strict=True):
            with replacing(folder / f"{number:05d}.png") as part:
                image.save(part, format="PNG")
    return folder
