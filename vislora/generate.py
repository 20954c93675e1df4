"""python -m vislora.generate adapter=FILE prompt="a blue jay on a branch" [adapter.scale=0.8] [key=value …]

Draws pictures with a pipeline, with one adapter or several (`adapter=[A,B] weights=[0.7,0.4]`) of any format. Every PNG
holds the settings that draw it again; of several pictures there is a sheet too, grid.png, with a column for each scale
of `scales=[0,0.5,1]`, or for each prompt.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislora import __version__
from vislora.compose import command, quoted
from vislora.config.commands import GenerateConfig
from vislora.config.model import PipelineConfig
from vislora.drawing import Sampling, draw, drawn_in, open_pipeline, pipeline_of, read_adapters, tell_cut_off
from vislora.errors import ConfigError
from vislora.files import check_there
from vislora.paths import user_path

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Generated:
    """A picture, how it came about, and where it is."""

    image: Image.Image
    settings: dict[str, Any]
    file: Path


def generate(config: GenerateConfig, out: Path) -> list[Generated]:
    """Draw `config.prompt` with each seed at each scale, into the folder `out`.

    Raises:
        VisloraError: a mistake in the settings, the adapter or the model, or a folder that holds pictures already.
    """
    if any(out.glob("*_seed*.png")):
        raise ConfigError(f"{out} holds drawn pictures already; choose another folder, as with hydra.run.dir=FOLDER")

    check_there(("adapter", file) for file in config.adapter.files)

    from vislora.pipeline import apply
    from vislora.report.sheets import save_grid

    files, scales = config.adapter.files, config.scales or [config.adapter.scale]
    adapters = read_adapters(config.model, files)
    if recognisers := [file for file, adapter in zip(files, adapters, strict=True) if "classes" in adapter.about]:
        raise ConfigError(
            f"{recognisers[0]} is a recogniser's adapter, which draws nothing; use "
            f"python -m vislora.predict adapter={recognisers[0]}"
        )
    model = pipeline_of(config.model, files, adapters)
    pipe = open_pipeline(model, config.precision)
    if config.negative_prompt is not None and not _heeds_negative_prompts(pipe):
        raise ConfigError(f"{type(pipe).__name__} pays no heed to a negative prompt; leave negative_prompt out")
    applied = apply(pipe, adapters, weights=config.weights) if adapters else None
    tell_cut_off(pipe, config.prompt)

    out.mkdir(parents=True, exist_ok=True)
    about = _about(config, model)
    sampling = Sampling(config.steps, config.guidance, config.size, config.negative_prompt)
    drawn: list[Generated] = []
    for prompt in config.prompt:
        for seed in config.seeds:
            for scale in scales:
                if applied is not None:
                    applied.scale = scale
                (image,) = draw(pipe, [(prompt, seed)], sampling)
                settings = {"prompt": prompt, "seed": seed, "scale": scale, **about, "size": list(image.size)}
                file = out / f"{len(drawn):04d}_seed{seed}{f'_scale{scale:g}' if adapters else ''}.png"
                _save(image, settings, file)
                drawn.append(Generated(image, settings, file))
    if len(drawn) > 1:
        rows, captions, names = _grid([picture.image for picture in drawn], config, scales)
        save_grid(rows, captions, out / "grid.png", names)
    return drawn


def _heeds_negative_prompts(pipe: Any) -> bool:
    """Not where guidance is distilled into the model, and a true one is off by default."""
    arguments = inspect.signature(pipe.__call__).parameters
    return "negative_prompt" in arguments and getattr(arguments.get("true_cfg_scale"), "default", 2.0) > 1.0


def _about(config: GenerateConfig, model: PipelineConfig) -> dict[str, Any]:
    """What all pictures of a run have in common."""
    import diffusers

    from vislora.data.cache import adapter_key

    files = config.adapter.files
    adapters = zip(files, config.weights or [1.0] * len(files), strict=True)
    return {
        "negative_prompt": config.negative_prompt,
        "steps": config.steps,
        "guidance": config.guidance,
        # with what they hold: another training may have written into the same folder since
        "adapters": [{"file": f, "weight": w, "contents": adapter_key(user_path(f))[:12]} for f, w in adapters],
        "precision": drawn_in(config.precision).value,  # the same noise in another one is another picture
        "model": {key: value for key, value in asdict(model).items() if key in ("name", "revision", "variant")},
        "vislora": __version__,
        "diffusers": diffusers.__version__,
    }


def _save(image: Image.Image, settings: dict[str, Any], file: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", _parameters(settings))
    info.add_text("vislora", json.dumps(settings, ensure_ascii=True))
    image.save(file, pnginfo=info)


def _parameters(settings: dict[str, Any]) -> str:
    """The settings in the words that viewers of generated pictures look for."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"] is not None:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    width, height = settings["size"]
    lines.append(
        f"Steps: {settings['steps']}, CFG scale: {settings['guidance']}, Seed: {settings['seed']}, "
        f"Size: {width}x{height}, Model: {settings['model']['name']}"
    )
    return "\n".join(lines)


def _grid(
    images: list[Image.Image], config: GenerateConfig, scales: Sequence[float]
) -> tuple[list[list[Image.Image]], list[str], list[str]]:
    """Rows of pictures, the captions of their columns, which are scales, or where there is one scale, prompts; and what
    tells the rows apart."""
    seeds = [f"seed {seed}" for seed in config.seeds] if len(config.seeds) > 1 else [""]
    if len(scales) == 1:
        return [images[row :: len(seeds)] for row in range(len(seeds))], list(config.prompt), seeds
    rows = [images[i : i + len(scales)] for i in range(0, len(images), len(scales))]
    prompts = config.prompt if len(config.prompt) > 1 else [""]
    names = [": ".join(filter(None, [seed, prompt])) for prompt in prompts for seed in seeds]
    return rows, [f"scale {scale:g}" for scale in scales], names


def _main(config: GenerateConfig, out: Path) -> None:
    drawn = generate(config, out)
    print(f"{len(drawn)} pictures: {out}" if len(drawn) > 1 else f"picture: {drawn[0].file}")


def _quoted(word: str) -> str:
    """A bare prompt in quotes for Hydra, which would take its commas and brackets apart."""
    key, _, text = word.partition("=")
    if key == "prompt" and not (text.startswith("[") and text.endswith("]")):
        return f"prompt=[{_in_quotes(text)}]"
    if key == "negative_prompt" and text != "null":
        return f"negative_prompt={_in_quotes(text)}"
    return word


def _in_quotes(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text
    return quoted(text)


if __name__ == "__main__":
    command("generate", _main, [_quoted(word) for word in sys.argv[1:]])
