"""python -m vislora.evaluate adapter=runs/…/adapter [data=imagefolder data.root=…] [split=test]
python -m vislora.evaluate adapter=STYLE [prompts=FILE] [reference=FOLDER] [scales=[0.5,1]]

Scores adapters: scores.csv and scores.json hold all of them as one table, report.html everything.

Those that recognise (or merged or fully tuned models), over data sets; a folder for each row holds its figures and
pictures. Without data=… each is scored on the data set of its training.

    adapter=[A,B]                          several, compared on the same images
    +data@sets.photos=imagefolder sets.photos.root=PHOTOS    a further data set, under a name of its own
    baselines=[zero,probe]                 beside each: the base model with the adapter's head; a linear probe of it,
                                           fitted to the train split of the data that are scored
    calibrate=true                         fit a temperature on the validation split, for another one
    corruptions=[noise,blur,brightness,contrast,jpeg,pixelate]    top-1 under five strengths of each

Those that draw (`vislora.picture_evaluation`), beside the base model from the same noise, and reference pictures.
Without prompts=… and reference=… they are the captions and pictures of the training.

    scales=[0,0.25,0.5,0.75,1]             style against content, to choose a scale by
    backbone.name=vit_small_patch14_dinov2 backbone.weights=FILE    whose features tell how far pictures are apart
    style_classifier=A content_classifier=B clip=C                  further judges
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislora.compose import command
from vislora.config.commands import Baseline, Corruption, EvaluateConfig, PictureFigures, RecognitionFigures
from vislora.config.data import (
    AugmentConfig,
    DataConfig,
    TorchvisionData,
    data_from_dict,
    data_to_dict,
    pictures_to_dict,
)
from vislora.config.training import Precision
from vislora.errors import AdapterError, ConfigError, DataError, first_three
from vislora.files import check_there, check_unused
from vislora.names import ends, short_names
from vislora.paths import user_path

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from PIL import Image

    from vislora.data.splits import ImageSplit, Splits
    from vislora.inference import Inference
    from vislora.metrics.updates import LayerUpdate
    from vislora.recognizer import Recognizer
    from vislora.report.scores import Scored


_FEW = 100  # pictures to fit a temperature to


@dataclass(frozen=True)
class _Set:
    """A data set to score on: its name and settings, its splits, the one that is scored, and how many pictures of that
    were learned, where it can be told."""

    title: str
    data: DataConfig
    splits: Splits
    split: ImageSplit
    learned: int | None


def evaluate(config: EvaluateConfig, out: Path | None = None) -> list[Scored]:
    """Score each of `config.adapter`, which recognise, and their baselines over each data set; write the figures and a
    report into `out` if given.

    Raises:
        VisloraError: a mistake in the settings, the data or the adapter, or a folder that holds a training or an
            evaluation already.
    """
    if out is not None:
        check_unused(out)
    abouts = _read_abouts(config)
    _check_heeded(config)

    from vislora.data.images import read_image
    from vislora.inference import Inference
    from vislora.precision import new_accelerator, resolve_precision
    from vislora.recognizer import load_recognizer
    from vislora.report.scores import Adapted, write_scores

    accelerator = new_accelerator(Precision.fp32)
    precision = resolve_precision(config.precision, accelerator.device)
    inference = Inference(config.batch_size, precision, config.workers, accelerator)
    # a mistake there is told before any work
    asked = [(path, read_image(user_path(path))) for path in config.map_images]
    loaded: dict[str, Splits] = {}
    told = zip(config.adapter, abouts, strict=True)
    sets = [_labelled_sets(config, folder, about, loaded, accelerator) for folder, about in told]  # likewise
    rows: list[Scored] = []
    adapted: list[Adapted] = []
    probes: dict[Any, Recognizer] = {}
    for name, folder, own in zip(short_names(config.adapter), config.adapter, sets, strict=True):
        recognizer = load_recognizer(folder, config.weights)
        recognizer.model.to(accelerator.device)
        for one in own:
            for variant, entered in _variants(name, recognizer, one, config, inference, probes):
                seen = one if variant == name else replace(one, learned=None)
                with entered as scored:
                    rows.append(_score(variant, seen, scored, config, inference))
        if out is not None:
            first = own[0].split
            adapted.append(Adapted(name, *_what_changed(recognizer, first, asked, config.maps, accelerator.device)))
    rows = _told_apart(rows)
    if out is not None and accelerator.is_main_process:
        write_scores(rows, adapted, config, out)
    accelerator.wait_for_everyone()
    return rows


def _read_abouts(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Before any work: what each folder's training noted down; it can be opened, holds an adapter where one is to be
    taken out, and its base weights are there where they are needed."""
    from vislora.formats.peft import CONFIG
    from vislora.recognizer import base_config, read_about

    abouts = []
    for folder in map(user_path, config.adapter):
        abouts.append(read_about(folder))
        adapted = (folder / CONFIG).is_file()
        if Baseline.zero in config.baselines and not adapted:
            raise AdapterError(
                f"baselines=[zero] takes the adapter out, and {folder} is a fully tuned or merged model and has none; "
                "leave it out, or compare with baselines=[probe]"
            )
        if adapted or Baseline.probe in config.baselines:
            base_config(abouts[-1], folder, config.weights)
    return abouts


def _check_heeded(config: EvaluateConfig) -> None:
    """Before any work: nothing is asked for that would change nothing."""
    from vislora.formats.peft import CONFIG
    from vislora.recognizer import check_weights

    given = {} if config.data is None else {"data": config.data}
    for key, data in (given | {f"sets.{name}": data for name, data in config.sets.items()}).items():
        if data.crop_pct is not None or data.augment != AugmentConfig():
            setting = "augment" if data.crop_pct is None else "crop_pct"
            raise ConfigError(
                f"{key}.{setting} is for training; an evaluation prepares pictures as the adapter's training validated "
                "them, so leave it out"
            )
    based = any((user_path(folder) / CONFIG).is_file() for folder in config.adapter)
    if not based and Baseline.probe not in config.baselines:
        check_weights(config.weights, config.adapter[0])


def _data_sets(config: EvaluateConfig, folder: str, about: dict[str, Any]) -> list[tuple[str, DataConfig]]:
    """The data sets by name: those of the command line, or that of the training."""
    named = list(config.sets.items())
    if config.data is not None:
        return [(data_to_dict(config.data)["option"], config.data), *named]
    if named:
        return named
    try:
        own = data_from_dict(about["data"])
    except ConfigError as error:
        raise ConfigError(f"what {folder} was trained on can't be told: {error}; give data=OPTION") from None
    root, option = getattr(own, "root", None), data_to_dict(own)["option"]
    if root is not None and not user_path(root).exists():
        raise ConfigError(
            f"{root}, on which {folder} was trained, isn't there; give data={option} data.root=FOLDER, or other data"
        )
    return [(option, own)]


def _labelled_sets(
    config: EvaluateConfig, folder: str, about: dict[str, Any], loaded: dict[str, Splits], accelerator: Accelerator
) -> list[_Set]:
    """The data sets to score an adapter on."""
    from vislora.scoring import labels_among

    found = []
    for title, data in _data_sets(config, folder, about):
        data = _as_trained(data, about)
        splits = _load(data, about.get("seed", 0), loaded, accelerator)
        split = _split(title, splits, config.split)
        if config.calibrate and splits.val is None:
            raise ConfigError(
                f"calibrate=true: {title} has no validation split; train with data.val_fraction, or give pictures that "
                "weren't learned, with data=… and data.val_fraction"
            )
        if config.split == "val" or config.calibrate:
            _check_held_out(folder, about, data, splits)
        labels_among(about["classes"], split)
        if Baseline.probe in config.baselines and len(splits.classes) < 2:
            raise ConfigError(
                f"baselines=[probe]: {title} has {splits.classes[0]!r} alone, and a probe tells classes apart; leave "
                "it out"
            )
        learned = _learned(about, splits, split, loaded, accelerator)
        if learned:
            accelerator.print(
                f"{folder} learned {len(learned):,} of the {len(split):,} pictures of {title}, or copies of them; its "
                f"figures there don't tell how it does on new ones: {first_three(learned)}"
            )
        found.append(_Set(title, data, splits, split, None if learned is None else len(learned)))
    return found


def _learned(
    about: dict[str, Any], splits: Splits, split: ImageSplit, loaded: dict[str, Splits], accelerator: Accelerator
) -> list[str] | None:
    """Names of those pictures of a split that the training learned, resized and recompressed ones too; None where that
    can't be told, as of pictures that don't lie in files, or not any more."""
    from vislora.data.duplicates import among
    from vislora.trainings import trainings

    parts = [_trained_on(one, loaded, accelerator) for one in trainings(about)]
    known = [picture for part in parts for picture in part]
    names = [name for name in split.names if name in splits.facts]
    if not known or not names:
        return None
    found = [names[i] for i in among([splits.facts[name].thumbnail for name in names], known)]
    return found if found or all(parts) else None  # of a blend in part they may be there all the same


def _trained_on(about: dict[str, Any], loaded: dict[str, Splits], accelerator: Accelerator) -> list[bytes]:
    """Thumbnails of the pictures that a training learned; none where they can't be told."""
    try:
        own = data_from_dict(about.get("data"))
        root = getattr(own, "root", None)
        known = isinstance(own, DataConfig) and not isinstance(own, TorchvisionData)
        if not known or root is None or not user_path(root).exists():
            return []
        trained = _load(own, about.get("seed", 0), loaded, accelerator)
    except (ConfigError, DataError, OSError):
        return []
    return [trained.facts[name].thumbnail for name in trained.train.names if name in trained.facts]


def _load(data: DataConfig, seed: int, loaded: dict[str, Splits], accelerator: Accelerator) -> Splits:
    """The data set, divided as a training with the seed does it: what it held out must not be what it learned."""
    from vislora.data.load import load_splits

    key = f"{data} {seed}"
    if key not in loaded:
        with accelerator.main_process_first():  # so that one process prepares the caches
            loaded[key] = load_splits(data, seed, fewest=1)
    return loaded[key]


def _as_trained(data: DataConfig, about: dict[str, Any]) -> DataConfig:
    """The settings, with paths as the training had them where they lead to the same place: what was held out is known
    by the pictures' names, which begin with them."""
    trained = about["data"] if isinstance(about["data"], dict) else {}
    same = {}
    for key in ("root", "quarantine"):
        path, theirs = getattr(data, key, None), trained.get(key)
        if path is not None and isinstance(theirs, str) and user_path(path).resolve() == user_path(theirs).resolve():
            same[key] = theirs
    return replace(data, **same)


def _check_held_out(folder: str, about: dict[str, Any], data: DataConfig, splits: Splits) -> None:
    """What is held out of the training's data now is what was held out then, or an error."""
    from vislora.trainings import learned_held_out, trainings

    learned = [one for one in trainings(about) if learned_held_out(one, data, splits.held_out_key)]
    if not learned:
        return
    if learned[0]["held_out_key"] is None:
        raise ConfigError(
            f"{folder} learned all pictures of train, and those that data.val_fraction would hold out as well; train "
            "with data.val_fraction, or give it pictures that it hasn't seen, with data=…"
        )
    raise ConfigError(
        f"the data, or data.val_fraction, have changed since {folder} was trained, and what is held out now it learned "
        "in part; give it pictures that it hasn't seen, with data=… and split=…"
    )


def _told_apart(rows: list[Scored]) -> list[Scored]:
    """The rows; where data sets have one name, with the settings in which they differ behind it."""
    roots = list(dict.fromkeys(filter(None, (row.pictures.get("root") for row in rows))))
    short = dict(zip(roots, ends([Path(root) for root in roots]), strict=True))
    told = []
    for row in rows:
        others = [other.pictures for other in rows if other.data == row.data]
        own = {k: v for k, v in row.pictures.items() if any(other.get(k) != v for other in others)}
        settings = [f"{key}={short.get(value) if key == 'root' else value}" for key, value in own.items()]
        told.append(replace(row, data=", ".join([row.data, *settings])))
    return told


def _split(title: str, splits: Splits, wanted: str) -> ImageSplit:
    split = {"train": splits.train, "val": splits.val, "test": splits.test}.get(wanted)
    if split is None:
        there = [name for name in ("train", "val", "test") if getattr(splits, name) is not None]
        more = "" if "val" in there else ", or train with data.val_fraction for a split=val"
        raise ConfigError(f"split={wanted}: {title} has {', '.join(there)}; give split={there[-1]}{more}")
    return split


def _variants(
    name: str,
    recognizer: Recognizer,
    data: _Set,
    config: EvaluateConfig,
    inference: Inference,
    probes: dict[Any, Recognizer],
) -> Iterator[tuple[str, AbstractContextManager[Recognizer]]]:
    """The recognizer and its baselines by name, each in the context it is to be run in. Of one base, with the same
    classes and pictures, there is one probe, which is kept in `probes`."""
    from vislora.baselines import linear_probe, without_update
    from vislora.report.sections import PROBED

    yield name, nullcontext(recognizer)
    if Baseline.zero in config.baselines:
        yield f"{name}, zero adapter", without_update(recognizer)
    if Baseline.probe in config.baselines:
        about = recognizer.about
        base = repr(about["model"]), about.get("weights_sha256"), recognizer.preprocessing
        key = *base, recognizer.classes, id(data.splits)
        if key not in probes:
            count = len(data.splits.train)
            inference.accelerator.print(f"linear probe: fitted to the {count:,} pictures in train of {data.title}")
            probes[key] = linear_probe(recognizer, data.splits.train, config.weights, inference)
        yield f"{name}{PROBED}", nullcontext(replace(probes[key], about=about))


def _score(name: str, data: _Set, recognizer: Recognizer, config: EvaluateConfig, inference: Inference) -> Scored:
    from vislora.metrics.calibration import fit_temperature
    from vislora.metrics.recognition import evaluate_predictions
    from vislora.report.scores import Scored
    from vislora.scoring import predict_split, show_mistakes

    temperature = None
    if config.calibrate:
        validation = predict_split(recognizer, data.splits.val, inference)
        try:
            temperature = fit_temperature(validation.logits, validation.labels)
        except DataError as error:  # of this row alone
            inference.accelerator.print(f"{name} on {data.title} isn't calibrated: {error}")
        if temperature is not None and (count := len(validation.labels)) < _FEW:
            inference.accelerator.print(
                f"{name} on {data.title}: {count} pictures are few to fit a temperature to; with it the calibration "
                "may be worse than without"
            )
    predictions = predict_split(recognizer, data.split, inference)
    evaluation = evaluate_predictions(predictions, temperature, config.resamples, config.seed)
    evaluation = replace(evaluation, mistakes=show_mistakes(predictions, data.split, config.mistakes))
    robustness = _robustness(recognizer, data.split, config.corruptions, inference)
    return Scored(name, data.title, pictures_to_dict(data.data), evaluation, robustness, data.learned)


def _robustness(
    recognizer: Recognizer, split: ImageSplit, kinds: list[Corruption], inference: Inference
) -> dict[Corruption, list[float]]:
    """Top-1 at strengths 1 to 5 of each kind of corruption."""
    from vislora.data.corruptions import STRENGTHS, corrupted
    from vislora.scoring import predict_split

    fitted = replace(recognizer.preprocessing, crop_pct=1.0)  # the pictures come at the model's size
    found: dict[Corruption, list[float]] = {}
    for kind in kinds:
        found[kind] = []
        for strength in range(1, STRENGTHS + 1):
            spoiled = corrupted(split, kind, strength, recognizer.preprocessing)
            predictions = predict_split(replace(recognizer, preprocessing=fitted), spoiled, inference)
            correct = predictions.logits.argmax(1) == predictions.labels
            found[kind].append(correct.double().mean().item())
    return found


def _what_changed(
    recognizer: Recognizer, split: ImageSplit, asked: list[tuple[str, Image.Image]], maps: int, device: torch.device
) -> tuple[list[LayerUpdate], Image.Image | None]:
    """The norms of the updates, and maps of what was looked at before and after: in the pictures asked for, or in so
    many of the split's."""
    from vislora.attribution_maps import draw_maps
    from vislora.metrics.updates import layer_updates

    updates = []
    if recognizer.adapters is not None:
        adapter = recognizer.adapters.adapter(recognizer.adapters.active)
        updates = layer_updates(adapter, recognizer.model)
    count = min(maps, len(split))
    chosen = [(2 * i + 1) * len(split) // (2 * count) for i in range(count)]
    pictures = asked or [(split.classes[split.labels[i]], split.image(i)) for i in chosen]
    return updates, draw_maps(recognizer, pictures, device) if pictures else None


def draws(config: EvaluateConfig) -> bool:
    """Whether the adapters are of pipelines, and draw; otherwise they recognise.

    Raises:
        AdapterError: one is a run's folder.
        ConfigError: one isn't there, they are of both kinds, or a setting is for the other kind.
    """
    check_there(("adapter", file) for file in config.adapter)

    from vislora.formats.detect import is_of_a_pipeline

    kinds = [is_of_a_pipeline(user_path(file)) for file in config.adapter]
    if len(set(kinds)) > 1:
        one, other = config.adapter[kinds.index(True)], config.adapter[kinds.index(False)]
        raise ConfigError(f"{one} draws and {other} recognises; evaluate them one after the other")
    does, other = ("draws", RecognitionFigures) if kinds[0] else ("recognises", PictureFigures)
    for key in fields(other):
        default = key.default if key.default_factory is MISSING else key.default_factory()
        if getattr(config, key.name) != default:
            raise ConfigError(f"{key.name} is not for {config.adapter[0]}, which {does}")
    return kinds[0]


def _main(config: EvaluateConfig, out: Path) -> None:
    are_drawing = draws(config)  # which tells what is missing before this import, which takes seconds

    from accelerate import PartialState

    if are_drawing:
        from vislora.picture_evaluation import evaluate_pictures
        from vislora.report.pictures import pictures_table, write_pictures

        check_unused(out)
        found, state = evaluate_pictures(config), PartialState()
        if state.is_main_process:
            write_pictures(found, config, out)
            print(pictures_table(found))
            print(f"figures, pictures and the report: {out / 'report.html'}")
        state.wait_for_everyone()
        return

    from vislora.report.scores import scores_table

    rows = evaluate(config, out)
    if PartialState().is_main_process:
        if len(rows) == 1:
            print(rows[0].evaluation.table())
        print(scores_table(rows))
        print(f"figures, pictures and the report: {out / 'report.html'}")


if __name__ == "__main__":
    command("evaluate", _main)
