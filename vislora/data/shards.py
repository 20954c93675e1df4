"""Pictures in tar files, as webdataset packs them: NAME.jpg beside NAME.cls or NAME.json.

A shard is indexed once; pictures are then read at their places in it. Nothing is unpacked, so that no name in a shard
can lead anywhere, and what isn't a regular file is never followed.
"""

import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vislora.config.data import ShardsData
from vislora.data.folder import SUFFIXES
from vislora.data.images import Place, Problem
from vislora.data.labels import class_name
from vislora.data.quarantine import leave_out
from vislora.data.rows import by_number, is_number
from vislora.data.splits import Splits, splits_of_files
from vislora.errors import DataError
from vislora.paths import user_path

_LONGEST_LABEL = 1 << 16  # bytes of a .cls or .json file


@dataclass(frozen=True)
class _Sample:
    name: Path
    place: Place
    label: str


def image_shards(config: ShardsData) -> Splits:
    """Labelled pictures of the splits that have shards, called SHARD/NAME; those that can't be decoded are left out and
    named in `problems`, and so are links to pictures, and labels without one.

    Raises:
        DataError: a pattern is malformed or no shard fits it, one is compressed or malformed, a picture has no label or
            two, a class isn't in train, or has no usable picture there.
    """
    root = user_path(config.root)
    samples, unread = _listed(config, root)
    labels = {sample.label for sample in samples["train"]}
    listed = tuple(sorted(labels, key=by_number))
    if config.classes is not None:
        count = len(config.classes)
        if odd := [label for label in listed if not (is_number(label) and int(label) < count)]:
            raise DataError(
                f"data.classes names {count} classes, for labels from 0 on, and the shards have label {odd[0]!r}; name "
                "one for each label, or leave data.classes out"
            )
    names = {label: label if config.classes is None else config.classes[int(label)] for label in listed}
    labelled = {split: [(sample.name, sample.label) for sample in found] for split, found in samples.items()}
    labelled, left_out = leave_out(labelled, config.quarantine, root)
    for split, pairs in labelled.items():  # by their labels: a class may be called like another's number
        if strange := next((pair for pair in pairs if pair[1] not in names), None):
            raise DataError(f"{split}: class {strange[1]!r} of {strange[0]} isn't among those of train")
    files = {split: [(name, names[label]) for name, label in pairs] for split, pairs in labelled.items()}
    places = {sample.name: sample.place for found in samples.values() for sample in found}
    classes = tuple(names.values()) if config.classes is None else tuple(config.classes)
    return splits_of_files(files, classes, [*left_out, *unread], list(names.values()), places)


def _listed(config: ShardsData, root: Path) -> tuple[dict[str, list[_Sample]], list[Problem]]:
    """What is in the shards by split, and what of it isn't read."""
    patterns = {"train": config.train, "val": config.val, "test": config.test}
    shards = {split: _shards(root, pattern) for split, pattern in patterns.items() if pattern is not None}
    split_of: dict[Path, str] = {}
    for split, paths in shards.items():
        for path in paths:
            if split_of.setdefault(path, split) != split:
                raise DataError(
                    f"{path} fits data.{split_of[path]}={patterns[split_of[path]]} and data.{split}={patterns[split]}, "
                    "and must not be in both; write patterns that tell them apart"
                )
    found = {split: [_samples(path, config.label_key) for path in paths] for split, paths in shards.items()}
    samples = {split: [sample for own, _ in parts for sample in own] for split, parts in found.items()}
    return samples, [problem for parts in found.values() for _, unread in parts for problem in unread]


def _shards(root: Path, pattern: str) -> list[Path]:
    """The files of a pattern, each once: with * and ?, and {000..012} as webdataset writes ranges."""
    names = [pattern]
    while (found := re.search(r"\{(\d+)\.\.(\d+)\}", names[0])) is not None:
        wide, numbers = len(found[1]), range(int(found[1]), int(found[2]) + 1)
        if not numbers:
            raise DataError(f"{pattern}: the range {found[0]} is empty; write the smaller number first")
        names = [name.replace(found[0], f"{number:0{wide}d}", 1) for name in names for number in numbers]
    shards: list[Path] = []
    for name in names:
        try:
            fitting = sorted(path for path in root.glob(name) if path.is_file())
        except (NotImplementedError, ValueError, IndexError) as error:  # pathlib's for "/x", "" and "."
            raise DataError(
                f"{name!r} is no pattern of shards: {error}; write it relative to data.root={root}, as 'train-*.tar'"
            ) from None
        if not fitting:
            raise DataError(f"no shard in {root} is called {name}")
        shards += fitting
    return list(dict.fromkeys(shards))  # train-1*.tar fits train-10.tar too


def _samples(shard: Path, label_key: str) -> tuple[list[_Sample], list[Problem]]:
    """What belongs to each name, in the shard's order, and what is no sample; a name is a path up to the first dot of
    its last part."""
    pictures: dict[str, tuple[Path, Place]] = {}
    labels: dict[str, str] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:  # uncompressed only: places are read directly
            for member in archive:
                name = PurePosixPath(member.name)  # so that ./a.png is a second a.png
                stem, _, suffix = name.name.partition(".")
                key, suffix = str(name.parent / stem), suffix.lower()
                if not (member.isfile() and stem):  # macOS packs ._a.png beside a.png
                    if stem and f".{suffix}" in SUFFIXES and (member.issym() or member.islnk()):
                        links[key] = f"is a link to {member.linkname}, and none is followed"
                elif f".{suffix}" in SUFFIXES:
                    if key in pictures:
                        raise DataError(f"{shard} has a second picture of {key}, {member.name}; give it another name")
                    place = Place(shard, member.offset_data, member.size)
                    pictures[key] = (Path(f"{shard}/{member.name}"), place)  # a name, never opened
                elif name.suffix.lower() in SUFFIXES:
                    raise DataError(
                        f"{shard}: {member.name} is no picture of {key} to webdataset, which takes a name up to its "
                        f"first dot; write {stem}_{suffix.replace('.', '_', suffix.count('.') - 1)}"
                    )
                elif suffix in ("cls", "json"):
                    if member.size > _LONGEST_LABEL:
                        raise DataError(f"{shard}: {member.name} has {member.size} bytes, too many for a label")
                    text = archive.extractfile(member).read()
                    label = _label(text, suffix, label_key, f"{shard}/{member.name}")
                    if label is not None and labels.setdefault(key, label) != label:
                        raise DataError(
                            f"{shard}: {key} has two labels, {labels[key]!r} and in {member.name} {label!r}; keep one"
                        )
            if _goes_on(archive):  # to tarfile a header that it can't read is the end
                raise DataError(
                    f"{shard} goes on behind byte {archive.offset}, where no entry can be read: it is damaged, or "
                    "several tar files in one; fetch it again, or keep them apart"
                )
    except tarfile.TarError as error:
        raise DataError(f"{shard} can't be read as an uncompressed tar file: {error}") from None
    if not pictures:
        raise DataError(f"{shard} holds no picture ({' '.join(SUFFIXES)})")
    if bare := next((key for key in pictures if key not in labels), None):
        raise DataError(f"{shard}: {bare} has no {bare}.cls, and no {label_key!r} in a {bare}.json")
    told = dict.fromkeys(labels, "has a label, but no picture") | links
    unread = [
        Problem(Path(f"{shard}/{key}"), f"{shard}/{key} {what}", usable=False, kinds=("unread",))
        for key, what in told.items()
        if key not in pictures
    ]
    return [_Sample(name, place, labels[key]) for key, (name, place) in pictures.items()], unread


def _goes_on(archive: tarfile.TarFile) -> bool:
    """Whether anything but zeros follows what has been read."""
    archive.fileobj.seek(archive.offset)
    return any(block.strip(b"\0") for block in iter(lambda: archive.fileobj.read(1 << 20), b""))


def _label(data: bytes, suffix: str, key: str, where: str) -> str | None:
    try:
        text = data.decode("utf-8").strip()
        value = {key: text} if suffix == "cls" else json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
        raise DataError(f"{where} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected {{"{key}": …, …}}')
    value = value.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: the label is {value!r}; expected a class's name or number")
    return class_name(str(value))
