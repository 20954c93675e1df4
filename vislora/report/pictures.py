"""An evaluation of adapters that draw, as a folder: one table, the pictures, sliders, sheets, the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from vislora import __version__
from vislora.config.commands import EvaluateConfig
from vislora.data.prompts import Prompt, noise_seed
from vislora.files import SETTINGS, write_json, write_rows, write_text
from vislora.metrics.pictures import TITLES, Estimate
from vislora.metrics.updates import LayerUpdate
from vislora.names import aligned
from vislora.report.before_after import file_name, write_pairs
from vislora.report.figures import save
from vislora.report.picture_sections import PICTURES, told
from vislora.report.sheets import save_grid
from vislora.report.sweep import draw_sweep
from vislora.report.updates import write_updates
from vislora.report.write import write_scores_report

_SHOWN = 8  # prompts on a sheet, and with a slider


@dataclass(frozen=True)
class PictureScores:
    """A row of the table.

    Attributes:
        name: of what drew: the base model, an adapter and its scale; or of the reference.
        adapter, scale: None for the base model and the reference.
        images: of each prompt with each seed, the prompts one after the other; the reference has none here.
        count: of pictures.
        figures: by the keys of `vislora.metrics.pictures.TITLES`, as far as there is something to tell.
        each: values of single pictures by the same keys, [N] each.
    """

    name: str
    adapter: str | None
    scale: float | None
    images: list[Image.Image]
    count: int
    figures: dict[str, Estimate]
    each: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureEvaluation:
    """Everything about an evaluation of adapters that draw.

    Attributes:
        prompts: what was drawn, each with each of `seeds`.
        rows: the reference where a classifier judges it, the base model, then each adapter at each scale.
        reference: where the reference pictures are from.
        backbone: name and SHA-256 of the weights whose features were compared.
        style: what the style classifier was to take pictures for; None without one.
        warnings: what to hold against the figures.
        updates: by adapter, how far it moved each layer.
        left_out: what is wrong with each file of the reference's folder that can't be used.
    """

    prompts: list[Prompt]
    seeds: list[int]
    rows: list[PictureScores]
    reference: str
    backbone: tuple[str, str]
    style: str | None
    warnings: list[str]
    updates: dict[str, list[LayerUpdate]]
    left_out: list[str]


def write_pictures(found: PictureEvaluation, config: EvaluateConfig, out: Path) -> None:
    """Write everything about an evaluation into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), out / SETTINGS)
    write_json(_to_dict(found), out / "scores.json")
    _write_table(found.rows, out / "scores.csv")
    _write_pictures(found, out)
    _write_sheets(found, out)
    for stem, *axes in (("sweep", "style", "content"), ("sweep_classes", "style_class", "content_class")):
        if curves := _curves(found.rows, *axes):
            save(draw_sweep(curves, *(f"{TITLES[key]} →" for key in axes)), out / stem)
    moved = [{"name": name, "folder": f"{i + 1:02d}_{file_name(name)}"} for i, name in enumerate(found.updates)]
    for row in moved:
        (out / row["folder"]).mkdir(exist_ok=True)
        write_updates(found.updates[row["name"]], out / row["folder"])
    write_json(moved, out / "adapters.json")
    subtitle = f"{len(found.prompts)} prompts, {len(found.seeds)} seeds; vislora {__version__}, "
    write_scores_report(out, list(found.updates), f"{subtitle}{datetime.now():%Y-%m-%d %H:%M}", PICTURES)


def pictures_table(found: PictureEvaluation) -> str:
    """The table for a terminal, what the figures stand on, and what is to be held against them."""
    keys = [key for key in TITLES if any(key in row.figures for row in found.rows)]
    cells = [["", "pictures", *(TITLES[key] for key in keys)]]
    for row in found.rows:
        cells.append([row.name, str(row.count), *(told(key, _pair(row.figures.get(key))) for key in keys)])
    lines = aligned(cells)
    name, sha256 = found.backbone
    lines.append(f"features: {name}, sha256 {sha256[:16]}…; reference: {found.reference}; 95% intervals over prompts")
    if found.style is not None:
        lines.append(f"the style: {found.style}")
    return "\n".join([*lines, *(f"note: {warning}" for warning in found.warnings)])


def _to_dict(found: PictureEvaluation) -> dict[str, Any]:
    name, sha256 = found.backbone
    rows = [
        {
            "name": row.name,
            "adapter": row.adapter,
            "scale": row.scale,
            "pictures": row.count,
            "figures": {key: asdict(figure) for key, figure in row.figures.items()},
        }
        for row in found.rows
    ]
    return {
        "backbone": {"name": name, "sha256": sha256},
        "reference": found.reference,
        "style": found.style,
        "prompts": [asdict(prompt) for prompt in found.prompts],
        "seeds": found.seeds,
        "left_out": found.left_out,
        "warnings": found.warnings,
        "rows": rows,
    }


def _write_table(rows: Sequence[PictureScores], file: Path) -> None:
    ends = [f"{key}{end}" for key in TITLES for end in ("", "_low", "_high")]
    table = [["name", "adapter", "scale", "pictures", *ends]]
    for row in rows:
        figures = [row.figures.get(key) for key in TITLES]
        values = [v for f in figures for v in ((f.value, f.low, f.high) if f is not None else (None,) * 3)]
        table.append([row.name, row.adapter, row.scale, row.count, *values])
    write_rows(table, file)


def _write_pictures(found: PictureEvaluation, out: Path) -> None:
    """Every picture drawn, and its values in pictures.csv."""
    keys = list(found.rows[-1].each)
    table = [["file", "name", "prompt", "label", "seed", "noise_seed", *keys]]
    for number, row in enumerate(found.rows):
        folder = Path("pictures") / f"{number:02d}_{file_name(row.name)}"
        jobs = [(prompt, seed) for prompt in found.prompts for seed in found.seeds] if row.images else []
        for i, ((prompt, seed), picture) in enumerate(zip(jobs, row.images, strict=True)):
            (out / folder).mkdir(parents=True, exist_ok=True)
            file = folder / f"{i:04d}_seed{seed}.png"
            picture.save(out / file)
            values = [row.each[key][i].item() for key in keys]
            told_of_it = [prompt.text, prompt.label, seed, noise_seed(seed, prompt.text)]
            table.append([file.as_posix(), row.name, *told_of_it, *values])
    write_rows(table, out / "pictures.csv")


def _write_sheets(found: PictureEvaluation, out: Path) -> None:
    """Of some prompts, spread over all, with the first seed: a sheet for each adapter with a row for each scale, and a
    slider between the base model and the scale nearest to 1."""
    count, seeds = min(_SHOWN, len(found.prompts)), len(found.seeds)
    chosen = [(2 * i + 1) * len(found.prompts) // (2 * count) for i in range(count)]
    texts = [found.prompts[i].text for i in chosen]
    base = next(row for row in found.rows if row.images)
    (out / "sheets").mkdir(exist_ok=True)
    sheets, pairs = [], ([], [], [])
    for number, name in enumerate(found.updates):
        rows = [base, *(row for row in found.rows if row.adapter == name)]
        pictures = [[row.images[i * seeds] for i in chosen] for row in rows]
        file = f"{number + 1:02d}_{file_name(name)}.png"
        save_grid(pictures, texts, out / "sheets" / file)
        sheets.append({"file": file, "rows": [row.name for row in rows]})
        nearest = min(range(1, len(rows)), key=lambda i: abs(rows[i].scale - 1))
        named = texts if len(found.updates) == 1 else [f"{rows[nearest].name}: {text}" for text in texts]
        for into, values in zip(pairs, (named, pictures[0], pictures[nearest]), strict=True):
            into.extend(values)
    write_json(sheets, out / "sheets" / "sheets.json")
    write_pairs(*pairs, out)


def _curves(
    rows: Sequence[PictureScores], style: str, content: str
) -> dict[str, list[tuple[float, Estimate, Estimate]]]:
    """Of adapters drawn with at several scales, where both figures are there; the base model is scale 0."""
    base = next(row for row in rows if row.images)
    curves = {}
    for name in dict.fromkeys(row.adapter for row in rows if row.adapter is not None):
        own = [row for row in rows if row.adapter == name]
        if len(own) > 1 and {style, content} <= set(base.figures):
            points = {row.scale or 0.0: (row.figures[style], row.figures[content]) for row in (base, *own)}
            curves[name] = [(scale, *points[scale]) for scale in sorted(points)]
    return curves


def _pair(figure: Estimate | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)
