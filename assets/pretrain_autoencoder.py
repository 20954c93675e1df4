"""python assets/pretrain_autoencoder.py [--resume RUN] [--epochs N]

Pretrains the autoencoder of the text-to-image pipeline that ships, on crops of drawings in every style (what it has
never seen, no style adapter could show), and writes it to assets/sd_birds/vae.

Latents are [B, 8, H / 4, W / 4]; training draws each channel to mean 0 and standard deviation 1, so that the pipeline
needs no scaling factor.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from vislora.compose import configure
from vislora.config.training import Precision
from vislora.data.birds import STYLES
from vislora.data.drawn import drawn_birds
from vislora.data.order import Order, SampleKey, mix
from vislora.logs import MetricLog
from vislora.paths import ASSETS
from vislora.precision import new_accelerator, resolve_precision
from vislora.trainer import Trainer

CROP = 32  # pixels
LATENT_NOISE = 0.02  # standard deviation: the decoder must bear what a denoiser gets slightly wrong
SETTINGS = [
    "model=embedded",
    "data=birds",
    "optim.lr=2e-3",
    "optim.weight_decay=0",
    "optim.warmup=0.02",
    "trainer.batch_size=64",
    "trainer.keep=last",
    "trainer.checkpoint_every=200",
]


class Autoencoder(nn.Module):
    """Crops [B, 3, H, W] in [-1, 1] -> (reconstructions [B, 3, H, W], latents [B, 8, H / 4, W / 4])."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderTiny(
            encoder_block_out_channels=(32, 32, 32),
            decoder_block_out_channels=(32, 32, 32),
            num_encoder_blocks=(0, 2, 3),
            num_decoder_blocks=(3, 2, 1),
            latent_channels=8,
        ).to(memory_format=torch.channels_last)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.vae.encode(crops).latents
        noisy = latents + LATENT_NOISE * torch.randn_like(latents) if self.training else latents
        return self.vae.decode(noisy).sample, latents


@dataclass(frozen=True)
class Reconstruction:
    """Distance to the crops and between their edges, and of each latent channel's moments to 0 and 1."""

    monitor: ClassVar[str] = "val_psnr"
    higher_is_better: ClassVar[bool] = True
    on_cpu: ClassVar[tuple[str, ...]] = ()

    def losses(self, model: nn.Module, crops: Tensor) -> Tensor:
        restored, latents = model(crops)
        error = restored.float() - crops
        distance = 0.5 * error.abs().mean((1, 2, 3)) + 6.0 * error.square().mean((1, 2, 3))
        edges = sum(torch.diff(error, dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3))
        deviation, mean = torch.std_mean(latents.float(), (0, 2, 3))
        return distance + 0.5 * edges + 0.1 * (mean.square() + (deviation - 1.0).square()).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, batches: Tensor, accelerator: Accelerator) -> dict[str, float]:
        errors = [(model(images)[0].float().clamp(-1, 1) - images).square().mean((1, 2, 3)) for images in batches]
        return {self.monitor: float((-10.0 * torch.log10(torch.cat(errors) / 4.0)).mean())}


def pictures() -> np.ndarray:
    """Named and invented birds in each style, uint8 [N, 64, 64, 3]."""
    shared = ["model=embedded", "data=birds", "data.val_per_species=0", "data.test_per_species=0", "data.seed=7"]
    named = ["data.train_per_species=24", "data.difficulty=0.2"]
    invented = ["data.train_per_species=6", "data.difficulty=0.3", "data.invented=120"]
    sets = [
        drawn_birds(configure("train", [*shared, *kind, f"data.style={style}"]).data).train
        for style in STYLES
        for kind in (named, invented)
    ]
    return np.concatenate([split.pictures.array for split in sets])


def crop(images: np.ndarray, key: SampleKey) -> Tensor:
    """A crop of a picture, at a place and in a reflection drawn for its showing; [3, CROP, CROP] in [-1, 1]."""
    draw = mix(*key)
    room = images.shape[1] - CROP + 1
    top, left = draw % room, draw // room % room
    cut = torch.from_numpy(images[key.index, top : top + CROP, left : left + CROP].copy()).permute(2, 0, 1)
    cut = cut.flip(2) if draw >> 40 & 1 else cut
    return cut.float() / 127.5 - 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_autoencoder"))
    parser.add_argument("--resume", type=Path, help="the folder of a run that was stopped")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    resume = [f"trainer.resume={options.resume}"] if options.resume else []
    config = configure("train", [*SETTINGS, *resume, f"trainer.epochs={options.epochs}"])
    precision = resolve_precision(Precision.auto, torch.device("cpu"))
    accelerator = new_accelerator(precision)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = pictures()
    whole = torch.from_numpy(images[::50].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(len(images), config.trainer.batch_size, config.seed, rank=rank, world=world)
    model = Autoencoder()

    def batches(start: int) -> Iterator[Tensor]:
        for step in range(start, config.trainer.epochs * order.steps_per_epoch):
            yield torch.stack([crop(images, key) for key in order.micro_batches(step)[0]])

    Trainer(
        model=model,
        objective=Reconstruction(),
        order=order,
        batches=batches,
        validation=whole.split(64),
        head=(),
        optim=config.optim,
        config=config.trainer,
        accelerator=accelerator,
        log=MetricLog(options.out, accelerator),
        out=options.out,
        run={},
    ).fit()
    if accelerator.is_main_process:
        model.vae.to(memory_format=torch.contiguous_format).save_pretrained(ASSETS / "sd_birds" / "vae")


if __name__ == "__main__":
    main()
