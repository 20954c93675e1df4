"""python -m vislora.doctor [models=PATTERN] [real=N] [workers=N]

Puts adapters on every attention architecture of timm, and tells by family whether they act, beside PEFT where it is
installed. All are built on the meta device, where a gradient must find its way to every adapter; the N smallest of each
family get random weights: trained, written, read, merged and taken out. Leaves doctor.json in the run folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislora.compose import command
from vislora.config.commands import DoctorConfig
from vislora.errors import AdapterError, ConfigError
from vislora.files import write_json
from vislora.names import aligned

if TYPE_CHECKING:
    from vislora.examination import Findings
    from vislora.structure import Structure


def doctor(config: DoctorConfig) -> tuple[list[Structure], list[Findings]]:
    """Every attention architecture whose name fits, and what came out of running the smallest of each family.

    Raises:
        ConfigError: no architecture with attention has such a name.
    """
    import timm

    from vislora.examination import examine
    from vislora.structure import look_at

    names = timm.list_models(config.models)
    structures = [s for s in _spread(look_at, names, config.workers, "built") if s.families]
    if not structures:
        raise ConfigError(f"models={config.models}: timm has {len(names)} such models, none of them with attention")
    structures = _traced(structures, config.workers)
    chosen = _smallest(structures, config.real)
    return structures, list(_spread(examine, chosen, config.workers, "run"))


def table(structures: list[Structure], findings: list[Findings]) -> str:
    """One row for each attention class."""
    found = {finding.name: finding for finding in findings}
    rows = [
        (
            "attention",
            "models",
            "live",
            "in PEFT",
            "run",
            "alive",
            "reloaded",
            "merged",
            "removed",
            "opened by PEFT",
            "e.g.",
        )
    ]
    for family in sorted({family for structure in structures for family in structure.families}):
        members = [structure for structure in structures if family in structure.families]
        run = [found[member.name] for member in members if member.name in found]
        rows.append((family.removeprefix("timm."), *_counts(members, run), run[0].name if run else ""))
    rows.append((f"{len(rows) - 1} classes", *_counts(structures, findings), ""))
    return "\n".join(aligned(rows, left=len(rows[0])))


def problems(structures: list[Structure], findings: list[Findings]) -> list[str]:
    """A line for each architecture that can't be adapted, or whose adapter failed one of the checks."""
    unfit = [f"{structure.name}: {structure.problem}" for structure in structures if structure.problem]
    failed = [f"{finding.name}: {finding.problem or finding}" for finding in findings if not finding.sound]
    return unfit + failed


def _counts(members: list[Structure], run: list[Findings]) -> tuple[str, ...]:
    def share(holds: Callable[[Findings], Any]) -> str:
        return f"{sum(map(bool, map(holds, run)))}/{len(run)}" if run else "-"

    verdicts = Counter(member.peft.partition(":")[0] for member in members if member.peft)
    return (
        str(len(members)),
        str(sum(member.problem is None for member in members)),
        ", ".join(f"{verdict} {verdicts[verdict]}" for verdict in sorted(verdicts)) or "-",
        str(len(run)),
        share(lambda finding: finding.size),
        share(lambda finding: finding.reloaded),
        share(lambda finding: finding.merged),
        share(lambda finding: finding.removed),
        share(lambda finding: finding.peft_opens) if verdicts else "-",
    )


def _traced(structures: list[Structure], workers: int) -> list[Structure]:
    """The same, told whether gradients reach their adapters: followed once in each layout, in its shallowest model."""
    from vislora.structure import reach

    sound = sorted((s for s in structures if s.problem is None), key=lambda structure: -structure.layers)
    shallowest = {structure.layout: structure.name for structure in sound}
    found = {reached.layout: reached for reached in _spread(reach, [*shallowest.values()], workers, "traced")}
    return [
        s if s.problem else replace(s, peft=found[s.layout].peft, problem=found[s.layout].problem) for s in structures
    ]


def _smallest(structures: list[Structure], count: int | None) -> list[str]:
    """Names of the smallest `count` architectures of each family, in the order of their sizes; all for None."""
    by_size = sorted((s for s in structures if s.problem is None), key=lambda structure: structure.parameters)
    families = {family for structure in by_size for family in structure.families}
    chosen = {s.name for family in families for s in [s for s in by_size if family in s.families][:count]}
    return [structure.name for structure in by_size if structure.name in chosen]


def _spread(work: Callable[[str], Any], names: list[str], workers: int, what: str) -> Iterable[Any]:
    """work(name) for all names, in their order, over several processes."""
    from torch.multiprocessing import get_context
    from tqdm import tqdm

    if workers == 0:
        yield from map(work, tqdm(names, unit="model", desc=what))
        return
    # spawned, since a forked process may hang in torch's threads
    with get_context("spawn").Pool(workers, _one_thread) as pool:
        yield from tqdm(pool.imap(work, names), total=len(names), unit="model", desc=what)


def _one_thread() -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def _main(config: DoctorConfig, out: Path) -> None:
    structures, findings = doctor(config)
    out.mkdir(parents=True, exist_ok=True)
    write_json({"structures": [*map(asdict, structures)], "findings": [*map(asdict, findings)]}, out / "doctor.json")
    print(table(structures, findings))
    print(f"details: {out / 'doctor.json'}")
    if wrong := problems(structures, findings):
        raise AdapterError(f"{len(wrong)} architectures failed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    command("doctor", _main)
