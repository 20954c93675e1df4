"""python benchmarks/style.py [--adapter FOLDER] [--seeds 0,1,2,3,4] [OVERRIDES of vislora.train recipe=sketch_style …]

Whether a style adapter gives the style and keeps the subject: the embedded pipeline draws each species once per seed,
and two classifiers trained on drawings, never on generated pictures, say in which style and of which species they are.
Every second drawing they learn from went through the pipeline's autoencoder, which softens whatever a pipeline draws.
A ridge regression from drawings' latents says which way the birds face; the prompts say which way they should. The base
model and the adapter at scale 0 stand beside it, and drawings that the classifiers have not seen, as they are and
through the autoencoder. Trains recipe=sketch_style first unless an adapter is given.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import vislora
from vislora.compose import configure
from vislora.config.model import PipelineConfig
from vislora.data.birds import SPECIES, STYLES, caption, picture, seeded_scene
from vislora.data.encoded import to_tensor
from vislora.data.order import mix
from vislora.drawing import Sampling, draw
from vislora.models.diffusion import load_pipeline
from vislora.recognizer import load_recognizer
from vislora.report.sheets import save_grid
from vislora.train import train

DIFFICULTY = 0.1
TRAIN, TEST = 1, 2  # parts of the drawings' seeds that the pipelines' own data don't touch

Judge = Callable[[Sequence[Image.Image]], list[str]]
"""What pictures are taken for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=25, help="of sampling")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="a folder for sheets of the pictures, and for the classifiers")
    parser.add_argument("overrides", nargs="*", help="as for vislora.train recipe=sketch_style")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="vislora-style-"))
    config = configure("train", ["recipe=sketch_style", *options.overrides])
    species, style = config.data.species, config.data.style

    seconds, adapter = 0.0, options.adapter
    if adapter is None:
        since = time.perf_counter()
        adapter = train(config, out / "adapter_run").artifact
        seconds = time.perf_counter() - since
    pipe = load_pipeline(PipelineConfig("embedded"))
    by_species = classifier(out / "species", species_drawings(species, style, pipe.vae))
    by_style = classifier(out / "style", style_drawings(species, pipe.vae))
    by_side = side_judge(side_drawings(species, style), pipe.vae)

    scenes = [seeded_scene(SPECIES[name], 7, DIFFICULTY) for name in species]
    prompts = [caption(SPECIES[name], scene) for name, scene in zip(species, scenes, strict=True)]
    print(f"torch {torch.__version__}; {date.today()}; {len(species)} species, seeds {options.seeds}, ", end="")
    print(f"{options.steps} steps, guidance {options.guidance}; adapter trained in {seconds:.0f} s")
    print(f"{'':30}" + "".join(f"{judged:>10}  {'by seed':^27}" for judged in (style, "species", "side")), flush=True)

    def row(title: str, rows: Sequence[Sequence[Image.Image]], sides: Sequence[Sequence[str]]) -> None:
        styles = [share(by_style(images), [style] * len(images)) for images in rows]
        kinds = [share(by_species(images), species) for images in rows]
        facing = [share(by_side(images), wanted) for images, wanted in zip(rows, sides, strict=True)]
        cells = (f"{statistics.mean(v):>10.1%}  {' '.join(f'{x:.2f}' for x in v):^27}" for v in (styles, kinds, facing))
        print(f"{title:30}{''.join(cells)}", flush=True)
        save_grid(rows, prompts, out / f"{title.replace(' ', '_')}.png")

    def drawn(title: str) -> None:
        wanted = [[(prompt, seed) for prompt in prompts] for seed in options.seeds]
        rows = [draw(pipe, jobs, Sampling(options.steps, options.guidance)) for jobs in wanted]
        row(title, rows, [[scene.facing for scene in scenes]] * len(rows))

    sides = [[side(name, mix(TEST, seed)) for name in species] for seed in options.seeds]
    for kind in dict.fromkeys(("natural", style)):
        seen = [[unseen(name, seed, kind) for name in species] for seed in options.seeds]
        row(f"drawings, {kind}", seen, sides)
        row(f"drawings, {kind}, encoded", [[through(pipe.vae, image) for image in images] for images in seen], sides)
    drawn("base model")
    applied = vislora.apply(pipe, adapter, scale=0.0)
    drawn("adapter, scale 0")
    for scale in (0.5, 1.0, 1.1):
        applied.scale = scale
        drawn(f"adapter, scale {scale:g}")
    print(f"pictures: {out}")


def share(told: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers that match what was wanted."""
    return statistics.mean(one == other for one, other in zip(told, wanted, strict=True))


def side(name: str, seed: int) -> str:
    """The one that the bird of a drawing faces."""
    return seeded_scene(SPECIES[name], seed, DIFFICULTY).facing


def unseen(name: str, seed: int, style: str) -> Image.Image:
    """A drawing that neither a classifier nor an adapter has learned from."""
    return picture(SPECIES[name], mix(TEST, seed), DIFFICULTY, style)


@torch.no_grad()
def through(vae: nn.Module, image: Image.Image) -> Image.Image:
    """The image, encoded and decoded."""
    decoded = vae.decode(vae.encode(to_tensor(image)[None]).latents).sample[0]
    return to_pil_image((decoded / 2 + 0.5).clamp(0.0, 1.0))


def species_drawings(species: Sequence[str], style: str, vae: nn.Module) -> Iterator[tuple[str, Image.Image]]:
    """Drawings of each species in the natural and in the adapter's style, by species."""
    for name in species:
        for i in range(24):
            for kind in dict.fromkeys(("natural", style)):
                image = picture(SPECIES[name], mix(TRAIN, i), DIFFICULTY, kind)
                yield name, through(vae, image) if i % 2 else image


def style_drawings(species: Sequence[str], vae: nn.Module) -> Iterator[tuple[str, Image.Image]]:
    """Drawings of all species in every style, by style."""
    for style in STYLES:
        for name in species:
            for i in range(4):
                image = picture(SPECIES[name], mix(TRAIN, 100 + i), DIFFICULTY, style)
                yield style, through(vae, image) if i % 2 else image


def side_drawings(species: Sequence[str], style: str) -> Iterator[tuple[str, Image.Image]]:
    """Drawings of each species in the natural and in the adapter's style, by the side that the bird faces."""
    for name in species:
        for seed in (mix(TRAIN, 200 + i) for i in range(24)):
            for kind in dict.fromkeys(("natural", style)):
                yield side(name, seed), picture(SPECIES[name], seed, DIFFICULTY, kind)


def classifier(folder: Path, drawings: Iterator[tuple[str, Image.Image]]) -> Judge:
    """A vision transformer tuned to tell the drawings' names; the one in the folder, where there is one."""
    if not (folder / "run" / "adapter").is_dir():
        for number, (name, image) in enumerate(drawings):
            (folder / "data" / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / "data" / name / f"{number:05d}.png")
        settings = ["model=embedded", "adapter=lora_mlp", "data=imagefolder", f"data.root={folder / 'data'}"]
        settings += ["data.val_fraction=0.1", "data.crop_pct=1.0", "data.augment.crop_scale=0.7"]
        settings += ["objective.label_smoothing=0.1", "optim.lr=4e-3", "optim.head_lr=1e-2", "trainer.validate_every=2"]
        settings += ["logger.trackers=[]"]
        train(configure("train", settings), folder / "run")
    recognizer = load_recognizer(folder / "run" / "adapter")

    @torch.no_grad()
    def judge(images: Sequence[Image.Image]) -> list[str]:
        return [recognizer.classes[k] for k in recognizer(images).argmax(1).tolist()]

    return judge


def side_judge(drawings: Iterator[tuple[str, Image.Image]], vae: nn.Module) -> Judge:
    """Left or right by ridge regression on latents: what mirrors a picture is linear in it."""
    sides, images = zip(*drawings, strict=True)
    x, y = latents(vae, images), torch.tensor([1.0 if facing == "right" else -1.0 for facing in sides])
    x, mean = x - x.mean(0), x.mean(0)
    penalty = 300.0 * torch.eye(len(x))  # any from 30 to 10,000 does nearly as well
    weights = x.T @ torch.linalg.solve(x @ x.T + penalty, y)

    def judge(images: Sequence[Image.Image]) -> list[str]:
        return ["right" if z > 0 else "left" for z in ((latents(vae, images) - mean) @ weights).tolist()]

    return judge


@torch.no_grad()
def latents(vae: nn.Module, images: Sequence[Image.Image]) -> torch.Tensor:
    """[N, C * h * w]"""
    return torch.cat([vae.encode(to_tensor(image)[None]).latents.flatten(1) for image in images])


if __name__ == "__main__":
    main()
