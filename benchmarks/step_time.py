"""python benchmarks/step_time.py [--models vit_tiny_patch16_224 vit_small_patch16_224] [--only VARIANT …] [--batch 32]
[--rounds 15]

What one training step costs: the frozen limit, vislora, PEFT and full fine-tuning, interleaved in one run.

The frozen limit is the least any adapter can cost: the model's forward pass, and the backward pass of activations from
the loss to the first block, with the head alone trained. A model may be built with arguments, as in
beit_base_patch16_224:embed_dim=192,num_heads=3. Where PEFT's adapters get no gradient, they are called dead and not
timed.
"""

import argparse
from ast import literal_eval
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import peft
import timm
import torch
from interleaved import HEADER, LIMIT, compare, machine
from torch import nn

from vislora.config.training import TrainerConfig
from vislora.lora import Adapters, LoraSettings
from vislora.models.vit import preprocessing
from vislora.precision import cpu_has_bf16
from vislora.targets.timm import find_targets

RANK, ALPHA = 8, 16


def limit(model: nn.Module) -> nn.Module:
    _head_only(model)
    # gradients flow down to the first block, as they must for adapters in it
    model.patch_embed.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    return model


def vislora(dropout: float, dora: bool = False) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        settings = LoraSettings(RANK, ALPHA, dropout, dora=dora)
        Adapters(model).add("default", find_targets(model, ["qkv", "o"]), settings, trained=["head"])
        return model

    return build


def with_peft(dropout: float, dora: bool = False) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            use_dora=dora,
            target_modules=[target.name for target in find_targets(model, ["qkv", "o"])],
            modules_to_save=["head"],
        )
        return peft.get_peft_model(model, config)

    return build


def full(model: nn.Module) -> nn.Module:
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    LIMIT: limit,
    "vislora": vislora(0.0),
    "vislora, dropout 0.1": vislora(0.1),
    "vislora, DoRA": vislora(0.0, dora=True),
    "vislora, DoRA, dropout 0.1": vislora(0.1, dora=True),
    "PEFT": with_peft(0.0),
    "PEFT, dropout 0.1": with_peft(0.1),
    "PEFT, DoRA": with_peft(0.0, dora=True),
    "PEFT, DoRA, dropout 0.1": with_peft(0.1, dora=True),
    "full fine-tuning": full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=TrainerConfig().batch_size)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="some of the rows")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [None, torch.bfloat16] if device.type == "cuda" or cpu_has_bf16() else [None]
    print(f"{machine()}; peft {peft.__version__}; batch {options.batch}")
    print(HEADER)
    for name in options.models:
        base = _built(name)
        size = preprocessing(base).size
        for dtype in dtypes:
            models = {
                title: build(deepcopy(base)).to(device).train()
                for title, build in VARIANTS.items()
                if title in {LIMIT, *options.only}
            }
            images = torch.randn(options.batch, 3, size, size, device=device)
            loss = partial(step_loss, images=images, dtype=dtype)
            for title in [title for title, model in models.items() if _is_dead(model, loss)]:
                print(f"{title} is dead on {name}: not all of its adapters get a gradient")
                del models[title]
            compare(name, models, loss, "fp32" if dtype is None else "bf16", options.rounds)


def step_loss(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    return logits.float().logsumexp(1).mean()


def _built(name: str) -> nn.Module:
    name, _, arguments = name.partition(":")
    pairs = (argument.split("=") for argument in arguments.split(",") if argument)
    return timm.create_model(name, num_classes=10, **{key: literal_eval(value) for key, value in pairs})


def _is_dead(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> bool:
    loss(model).backward()
    dead = any(p.grad is None for name, p in model.named_parameters() if "lora_B" in name)
    model.zero_grad(set_to_none=True)
    return dead


def _head_only(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


if __name__ == "__main__":
    main()
