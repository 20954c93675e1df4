"""A data set's preflight in words."""

from pathlib import Path

from vislora.data.preflight import Finding, Level, Preflight
from vislora.names import printable

_SHOWN = 5  # items of a finding; preflight.json has them all
_HEADINGS = {Level.bad: "Bad", Level.check: "To be looked at", Level.note: "Good to know"}


def summary(found: Preflight, root: Path | None, quarantine: Path | None) -> str:
    """Everything on a page, what to do last; names of files are relative to `root`."""
    lines = [_contents(found)]
    for level, heading in _HEADINGS.items():
        if findings := [finding for finding in found.findings if finding.level is level]:
            lines += ["", heading, *(line for finding in findings for line in _described(finding, root))]
    return "\n".join([*lines, "", "What to do", *_steps(found, quarantine)])


def headline(found: Preflight) -> str | None:
    """What matters, in a line; None where nothing does."""
    return "; ".join(finding.what for finding in found.findings if finding.level is not Level.note) or None


def _contents(found: Preflight) -> str:
    splits = ", ".join(
        f"{found.pictures[name]:,} {name}" for name in ("train", "val", "test") if name in found.pictures
    )
    line = f"{sum(found.pictures.values()):,} usable pictures ({splits or 'none'})"
    if found.classes:
        train = [counts.get("train", 0) for counts in found.classes.values()]
        line += f" of {len(found.classes):,} classes, {min(train):,} to {max(train):,} each to train on"
    if (s := found.sizes) is not None:
        line += f"\nshorter sides of {s.smallest} to {s.largest} pixels, median {s.median:g}"
        line += f"; the model's are {found.input_size}" if found.input_size is not None else ""
    if (c := found.captions) is not None:
        line += f"\n{c.distinct:,} different captions of {c.shortest} to {c.longest} words, median {c.median:g}"
        line += "".join(f"\n  {count:,} begin with {word!r}" for word, count in c.first_words[:3])
    return line


def _described(finding: Finding, root: Path | None) -> list[str]:
    lines = [f"  {finding.what} ({finding.kind})"]
    for item in finding.items[:_SHOWN]:
        lines.append(f"    {printable(_relative(item.name, root))}  {printable(_relative(item.what, root))}")
    if len(finding.items) > _SHOWN:
        lines.append(f"    … {len(finding.items) - _SHOWN:,} more")
    return lines


def _steps(found: Preflight, quarantine: Path | None) -> list[str]:
    steps = [f"repair this first: {found.error}"] if found.error else []
    if quarantine is not None:
        steps.append(f"look through {quarantine}, then train with data.quarantine={quarantine}")
    by_remedy: dict[str, list[str]] = {}
    for finding in found.findings:
        by_remedy.setdefault(finding.remedy, []).append(finding.kind)
    steps += [f"{', '.join(dict.fromkeys(kinds))}: {remedy}" for remedy, kinds in by_remedy.items() if remedy]
    return [f"  - {printable(step)}" for step in steps] or ["  - nothing: train"]


def _relative(text: str, root: Path | None) -> str:
    return text.replace(f"{root}/", "") if root is not None else text
