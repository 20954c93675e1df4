"""Many files looked into: in parallel, each once, and what was found kept in the cache."""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
from joblib import Parallel, delayed
from tqdm import tqdm

from vislora.data.images import Facts, Place, Problem, inspect, no_warnings
from vislora.files import naming
from vislora.paths import cache_dir

_EDITION = 4  # of what is told of a file; the next one where the same file is told of otherwise
_PROCESSES_FROM = 2000  # files; threads, which share the interpreter, are done with fewer before processes have started
_Picture = tuple[Path, Place | None]
_BATCH = 32  # files; each is in the cache when it is done, so that an interrupted run goes on from there


def inspect_files(paths: Sequence[Path], places: Mapping[Path, Place] | None = None) -> dict[Path, Facts]:
    """Decode every picture once, on all cores, and tell what each is, in the order of `paths`; those in `places` lie in
    larger files, and their paths are but names.

    What was found about usable files is kept in the cache, one list for each folder, and holds while their size and
    time of change do. Unusable ones are tried again each time: a disk or a permission may have been the cause.
    """
    places = places or {}
    states = {path: _state(places[path].file if path in places else path) for path in paths}
    known = {folder: _Store(folder) for folder in {path.absolute().parent for path in states}}
    found = {path: known[path.absolute().parent].look_up(path, state) for path, state in states.items()}
    fresh = [path for path, facts in found.items() if facts is None]
    with tqdm(total=len(fresh), desc="checking images", unit="", delay=2, leave=False, disable=None) as bar:
        for batch in _inspected([(path, places.get(path)) for path in fresh]):
            by_folder: dict[Path, dict[Path, Facts]] = {}
            for facts, path in batch:
                found[path] = facts
                if facts.usable and states[path] is not None:
                    by_folder.setdefault(path.absolute().parent, {})[path] = facts
            for folder, usable in by_folder.items():
                known[folder].add(usable, states)
            bar.update(len(batch))
    return found


def _inspected(pictures: list[_Picture]) -> Iterator[list[tuple[Facts, Path]]]:
    batches = [pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH)]
    if len(pictures) >= _PROCESSES_FROM:
        pool = Parallel(-1, return_as="generator")  # whose processes don't run the user's script once more
        yield from _with_paths(batches, pool(delayed(_inspect_quietly)(batch) for batch in batches))
    else:
        threads = min(8, (os.cpu_count() or 1) + 1)  # more than cores, since some wait for the disk
        with no_warnings(), ThreadPoolExecutor(threads) as pool:
            yield from _with_paths(batches, pool.map(_inspect_batch, batches))


def _with_paths(batches: list[list[_Picture]], found: Iterable[list[Facts]]) -> Iterator[list[tuple[Facts, Path]]]:
    for batch, facts in zip(batches, found, strict=True):
        yield [(fact, path) for fact, (path, _) in zip(facts, batch, strict=True)]


def _inspect_batch(pictures: list[_Picture]) -> list[Facts]:
    return [inspect(path, place) for path, place in pictures]


def _inspect_quietly(pictures: list[_Picture]) -> list[Facts]:
    """In a process of its own: threads share the filters of warnings."""
    with no_warnings():
        return _inspect_batch(pictures)


def _state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


class _Store:
    """What is known about the files of a folder: a line of JSON each, the last one counts."""

    def __init__(self, folder: Path) -> None:
        # what is odd, and what can be decoded, depends on Pillow, hence its version
        key = hashlib.sha256(f"{folder} {PIL.__version__} {_EDITION}".encode(errors="surrogateescape")).hexdigest()[:24]
        self.path = cache_dir() / "inspected" / f"{key}.jsonl"
        self.rows = dict(self._read())

    def look_up(self, path: Path, state: list[int] | None) -> Facts | None:
        row = self.rows.get(path.name)
        if row is None or state is None or row["state"] != state:
            return None
        problem = Problem(path, row["what"], usable=True, kinds=tuple(row["kinds"])) if row["kinds"] else None
        return Facts(problem, *row["size"], base64.b64decode(row["thumbnail"]))

    def add(self, found: dict[Path, Facts], states: dict[Path, list[int] | None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_line(path.name, states[path], facts) for path, facts in found.items()]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + "".join(lines))  # a line that was cut short by an interruption ends here

    def _read(self) -> Iterator[tuple[str, dict]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):  # not there yet, or damaged: the files are decoded again
            return
        for line in lines:
            try:
                row = json.loads(line)
                yield row["name"], {key: row[key] for key in ("state", "what", "kinds", "size", "thumbnail")}
            except (ValueError, KeyError, TypeError):
                continue


def _line(name: str, state: list[int] | None, facts: Facts) -> str:
    row = {
        "name": name,
        "state": state,
        "kinds": facts.problem.kinds if facts.problem else [],
        "what": facts.problem.what if facts.problem else "",
        "size": [facts.width, facts.height],
        "thumbnail": base64.b64encode(facts.thumbnail).decode(),
    }
    return json.dumps(row) + "\n"
