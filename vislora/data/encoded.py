"""Captioned pictures as the denoiser takes them: latents and text, encoded once and kept, or pixels and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vislora.data.buckets import Size, cut
from vislora.data.cache import TensorCache, content_key
from vislora.data.captions import Captioned
from vislora.data.order import SampleKey, mix

_AT_ONCE = 8  # pictures, or captions, that go through an encoder together

LATENTS, TEXT = TensorCache("latents"), TensorCache("text")


class Encoder(Protocol):
    """A pipeline's autoencoder and text encoders.

    Attributes:
        image_key, text_key: hashes of their weights and settings.
    """

    image_key: str
    text_key: str

    def images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]."""

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token numbers by name, [B, L]."""

    def text(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser reads, each with B rows."""


@dataclass(frozen=True)
class Gallery:
    """What an epoch shows.

    Attributes:
        captioned: the pictures.
        sizes: what each is cut to.
        weights: of each one's loss.
        shown: the picture of each showing; a picture may be shown several times an epoch.
        hflip: probability of a showing's being mirrored.
    """

    captioned: Captioned
    sizes: Sequence[Size]
    weights: Sequence[float]
    shown: Sequence[int]
    hflip: float = 0.0

    def __len__(self) -> int:
        return len(self.shown)

    def sample(self, key: SampleKey) -> tuple[int, bool]:
        """The picture of a showing, and whether it is mirrored."""
        return self.shown[key.index], mix(*key, 1) / 2**63 < self.hflip

    def image(self, picture: int, mirrored: bool) -> tuple[Image.Image, Tensor]:
        """The picture, cut, and where it was cut as SDXL is told: original height and width, upper and left edge of the
        cut, height and width of it, [6]."""
        crop = cut(self.captioned.pictures[picture], self.sizes[picture])
        image = crop.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop.image
        (width, height), (left, top) = crop.original, crop.corner
        return image, torch.tensor([height, width, top, left, image.height, image.width])


class PixelSet(Dataset):
    """Showings by `SampleKey`, each to be encoded when it comes: images [3, H, W] in [-1, 1], and tokens."""

    def __init__(self, gallery: Gallery, tokens: dict[str, Tensor]) -> None:
        self.gallery, self.tokens = gallery, tokens

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        picture, mirrored = self.gallery.sample(key)
        image, where = self.gallery.image(picture, mirrored)
        text = {name: rows[picture] for name, rows in self.tokens.items()}
        return _sample(self.gallery, key, picture, where, text) | {"images": to_tensor(image)}


class LatentSet(Dataset):
    """Showings by `SampleKey`, from the cache: latents [C, h, w], and text."""

    def __init__(self, gallery: Gallery, tokens: dict[str, Tensor] | None, keys: "Keys") -> None:
        self.gallery, self.tokens, self.keys = gallery, tokens, keys

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        picture, mirrored = self.gallery.sample(key)
        found = LATENTS.read(self.keys.latents[picture, mirrored])
        if self.tokens is not None:
            text = {name: rows[picture] for name, rows in self.tokens.items()}
        else:
            text = TEXT.read(self.keys.text[self.gallery.captioned.captions[picture]])
        return _sample(self.gallery, key, picture, found["where"], text) | {"latents": found["latents"]}


@dataclass(frozen=True)
class Keys:
    """Where the cache has the latents of (picture, mirrored), and the text of a caption."""

    latents: dict[tuple[int, bool], str]
    text: dict[str, str]


def encode(gallery: Gallery, encoder: Encoder, with_text: bool) -> Keys:
    """Put what isn't in the cache yet into it.

    An entry of a picture hangs on its pixels after cutting, where it was cut, and the autoencoder; one of a caption on
    its tokens, which another tokenizer makes differently, and the text encoders.
    """
    views = [(picture, mirrored) for picture in sorted(set(gallery.shown)) for mirrored in _mirrorings(gallery.hflip)]
    latents: dict[tuple[int, bool], str] = {}
    pending: list[tuple[str, Image.Image, Tensor]] = []

    def flush() -> None:
        if pending:
            encoded = encoder.images(torch.stack([to_tensor(image) for _, image, _ in pending])).cpu()
            for (key, _, where), row in zip(pending, encoded, strict=True):
                LATENTS.write(key, {"latents": row.clone(), "where": where})
            pending.clear()

    for view in tqdm(views, desc="encoding pictures", unit="", delay=2, leave=False, disable=None):
        image, where = gallery.image(*view)
        key = content_key(image.tobytes(), *image.size, *where.tolist(), encoder.image_key)
        latents[view] = key
        if key not in LATENTS:
            if len(pending) == _AT_ONCE or (pending and pending[0][1].size != image.size):
                flush()
            pending.append((key, image, where))
    flush()
    captions = sorted({gallery.captioned.captions[i] for i in gallery.shown} | {""}) if with_text else []
    tokens = encoder.tokens(captions) if captions else {}
    text = {
        caption: content_key(encoder.text_key, *(rows[i].numpy().tobytes() for rows in tokens.values()))
        for i, caption in enumerate(captions)
    }
    missing = [i for i, caption in enumerate(captions) if text[caption] not in TEXT]
    for start in tqdm(range(0, len(missing), _AT_ONCE), desc="encoding captions", delay=2, leave=False, disable=None):
        part = missing[start : start + _AT_ONCE]
        encoded = encoder.text({name: rows[part] for name, rows in tokens.items()})
        rows = {name: value.cpu() for name, value in encoded.items()}
        for row, i in enumerate(part):
            TEXT.write(text[captions[i]], {name: value[row].clone() for name, value in rows.items()})
    return Keys(latents, text)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def _mirrorings(hflip: float) -> Sequence[bool]:
    return [mirrored for mirrored, share in ((False, 1.0 - hflip), (True, hflip)) if share > 0.0]


def _sample(gallery: Gallery, key: SampleKey, picture: int, where: Tensor, text: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "seed": mix(*key),
        "weight": torch.tensor(gallery.weights[picture]),
        "text": text | {"time_ids": where.float()},
    }
