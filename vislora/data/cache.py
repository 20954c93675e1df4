"""Tensors computed once and kept on disk, under the hash of everything they depend on."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn, uint8

from vislora.data.images import Facts
from vislora.errors import DataError
from vislora.files import sha256, write_tensors
from vislora.paths import cache_dir


@dataclass(frozen=True)
class TensorCache:
    """Named tensors by key, each entry a safetensors file in a folder of the cache.

    An entry is never changed: what it depends on is in its key, so other inputs are another entry.
    """

    folder: str

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def read(self, key: str) -> dict[str, Tensor]:
        """An entry.

        Raises:
            DataError: it is damaged, as of a machine that lost its power, or has been deleted meanwhile.
        """
        try:
            return load_file(self._file(key))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self._file(key)} of the cache can't be read ({error}); delete it, the next run makes it anew"
            ) from None

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, file)

    def _file(self, key: str) -> Path:
        return cache_dir() / self.folder / key[:2] / f"{key}.safetensors"


def content_key(*parts: bytes | str | int | bool | None) -> str:
    """A hash of the parts, each with its kind and length, so that no two lists of them have the same."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(f"{type(part).__name__} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def adapter_key(adapter: Path) -> str:
    """A hash of an adapter's file, or of those in its folder that `read_adapter` may read."""
    own = [*adapter.glob("*"), *adapter.glob("*/*")] if adapter.is_dir() else [adapter]
    files = sorted(path for path in own if path.suffix in (".json", ".safetensors"))
    return content_key(*(part for path in files for part in (path.name, sha256(path))))


def pictures_key(names: Iterable[str], facts: Mapping[str, Facts], elsewhere: str | None = None) -> str:
    """A hash of pictures by what is known of those that lie in files, their sizes and thumbnails: another picture under
    an old name changes it.

    Args:
        elsewhere: a hash of those that don't lie in files.
    """
    known = (facts[name] for name in names if name in facts)
    parts = [f"{fact.width} {fact.height} {fact.thumbnail.hex()}" for fact in known]
    return content_key(*parts, *([] if elsewhere is None else [elsewhere]))


def weights_key(modules: Iterable[nn.Module]) -> str:
    """A hash of the modules' classes, parameters and buffers."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(type(module).__name__.encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy())
    return digest.hexdigest()
