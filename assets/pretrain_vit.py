"""python assets/pretrain_vit.py [--resume RUN]

Pretrains the vision transformer that ships, on drawings of invented species only, and writes it to assets/vit_birds in
timm's folder layout (fp16, without its head). 38 minutes on two cores with native bf16, shared with other work; longer
where fp32 has to do. None of the named species is ever drawn here.
"""

import argparse
from pathlib import Path

import timm
import torch

from vislora.compose import configure
from vislora.data.transforms import Preprocessing
from vislora.models.vit import EMBEDDED, save_vit
from vislora.train import train

SETTINGS = [
    "model=timm",
    "model.name=vit_tiny_patch16_224",
    "model.weights=random",
    "model.img_size=64",
    "model.pool=avg",
    "+model.args={patch_size:8,depth:6}",
    "data=birds",
    "data.invented=320",
    "data.train_per_species=120",
    "data.val_per_species=5",
    "data.test_per_species=0",
    "data.difficulty=0.8",
    "data.crop_pct=1.0",
    "data.augment.crop_scale=0.6",
    "adapter=full",
    "objective.label_smoothing=0.1",
    "optim.lr=1.5e-3",
    "optim.weight_decay=0.05",
    "trainer.epochs=6",
    "trainer.batch_size=128",
    "trainer.keep=last",
    "trainer.checkpoint_every=100",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_vit"))
    parser.add_argument("--resume", type=Path, help="the folder of a run that was stopped")
    options = parser.parse_args()
    resume = [f"trainer.resume={options.resume}"] if options.resume else []
    result = train(configure("train", SETTINGS + resume), options.out)
    model = timm.create_model(f"local-dir:{result.artifact}", pretrained=True)
    model.reset_classifier(0)
    size, half = 64, (0.5, 0.5, 0.5)
    about = {"preprocessing": Preprocessing(size, half, half, "bicubic", 1.0).to_dict()}
    save_vit(model.to(torch.float16), EMBEDDED, about)


if __name__ == "__main__":
    main()
