"""Draw the README's picture of a style adapter: the pipeline that ships, without and with it, from the same noise.

python assets/style_sheet.py runs/sketch_style/RUN/adapter

writes sketch.png beside this file.
"""

import sys
from pathlib import Path

import vislora
from vislora.config.model import PipelineConfig
from vislora.drawing import Sampling, draw
from vislora.models.diffusion import load_pipeline
from vislora.report.sheets import save_grid

PROMPTS = [
    "a northern cardinal on a branch, facing left",
    "an american goldfinch on a wire, facing left",
    "an american robin on a branch, facing right",
    "a scarlet tanager by a flower, facing left",
    "an atlantic puffin on a rock, facing left",
    "a blue jay in the grass, facing left",
    "a tree swallow on a wire, facing right",
]


def main(adapter: str) -> None:
    pipe = load_pipeline(PipelineConfig("embedded"))
    jobs = [(prompt, 0) for prompt in PROMPTS]
    before = draw(pipe, jobs, Sampling(steps=25, guidance=3.0))
    vislora.apply(pipe, adapter)
    after = draw(pipe, jobs, Sampling(steps=25, guidance=3.0))
    save_grid([before, after], PROMPTS, Path(__file__).parent / "sketch.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
