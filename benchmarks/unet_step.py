"""python benchmarks/unet_step.py [--models embedded sd15] [--rounds 10]

What one training step of a diffusion UNet costs: the frozen limit, vislora and PEFT, interleaved in one run.

The frozen limit is the least any adapter can cost: the forward pass, and the backward pass of activations from the loss
to the input of the first adapted layer. Adapters of rank 8 are on q, k, v and o of self and cross attention; under
"convolutions" on all of the UNet's as well. The variants share the frozen weights, which are random; under bf16
autocast they are in float32 on a CPU, which casts them in every step of every variant, and in bf16 on a GPU, as the
trainer has them. "As trained" is the same step as the trainer has a CPU take it, in a process of its own: freed
memory stays with the process, and in bf16 the frozen weights are cast once and short attention is computed in float32.
"""

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy

import peft
import torch
from diffusers import UNet2DConditionModel
from interleaved import HEADER, LIMIT, Process, compare, machine, saved_bytes, step
from torch import Tensor, nn

from vislora.config.training import Precision
from vislora.lora import Adapters, LoraSettings
from vislora.precision import (
    CastOnce,
    autocast_dtype,
    cpu_has_bf16,
    denormals_as_zero,
    freed_memory_kept,
    new_accelerator,
    training_attention,
)
from vislora.targets.diffusers import find_targets

RANK, ALPHA = 8, 8
ATTENTION = ["q", "k", "v", "o"]
AS_TRAINED = "vislora, as trained"
CONVOLUTIONS = [*ATTENTION, "proj", "conv"]


def embedded() -> nn.Module:
    """Of the size of the pipeline that ships: 6M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=128,
    )


def sd15() -> nn.Module:
    """Stable Diffusion 1.5's: 860M parameters."""
    return UNet2DConditionModel(cross_attention_dim=768)


# model: (how it is built, batch, side of the latents, tokens of the text)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "embedded": (embedded, 16, 16, 24),
    "sd15": (sd15, 1, 64, 77),
}


def limit(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    first = model.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    first.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    return model


def vislora(dropout: float, projections: list[str]) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        targets = find_targets(model, projections)
        Adapters(model).add("default", targets, LoraSettings(RANK, ALPHA, dropout))
        return model

    return build


def with_peft(dropout: float, projections: list[str]) -> Callable[[nn.Module], nn.Module]:
    def build(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        names = [target.name for target in find_targets(model, projections)]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=names)
        adapted = peft.inject_adapter_in_model(config, model)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:  # trained in float32 under autocast, whatever the frozen weights are in
                parameter.data = parameter.data.float()
        return adapted

    return build


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    LIMIT: limit,
    "vislora": vislora(0.0, ATTENTION),
    "vislora, dropout 0.1": vislora(0.1, ATTENTION),
    "vislora, convolutions": vislora(0.0, CONVOLUTIONS),
    "PEFT": with_peft(0.0, ATTENTION),
    "PEFT, dropout 0.1": with_peft(0.1, ATTENTION),
    "PEFT, convolutions": with_peft(0.0, CONVOLUTIONS),
}

ROWS = [*VARIANTS, AS_TRAINED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS, help="some of the rows")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = [Precision.fp32, Precision.bf16] if device.type == "cuda" or cpu_has_bf16() else [Precision.fp32]
    print(f"{machine()}; peft {peft.__version__}")
    print(HEADER)
    for name in options.models:
        build, batch, side, _ = MODELS[name]
        base = build().to(device).train().requires_grad_(False)
        for precision in precisions:
            if precision is Precision.bf16 and device.type == "cuda":
                base = base.to(torch.bfloat16)
            shared = {id(parameter): parameter for parameter in base.parameters()}
            models = {
                title: make(deepcopy(base, dict(shared)))
                for title, make in VARIANTS.items()
                if title in {LIMIT, *options.only}
            }
            apart = {}
            if device.type == "cpu" and AS_TRAINED in options.only:
                apart[AS_TRAINED] = Process(as_trained, name, precision)
            title = f"{name}, batch {batch}, latents {side}x{side}"
            compare(title, models, loss_of(name, base, precision), precision.value, options.rounds, apart)
            for process in apart.values():
                process.close()


def as_trained(name: str, precision: Precision) -> Iterator[int | float]:
    """The bytes that a step of one of `MODELS` keeps for backward, then the seconds of its steps."""
    accelerator = new_accelerator(precision)
    with denormals_as_zero(), freed_memory_kept(accelerator.device), training_attention(accelerator):
        model = VARIANTS["vislora"](MODELS[name][0]().train())
        loss = loss_of(name, model, precision)
        with CastOnce(model, autocast_dtype(precision)):
            yield saved_bytes(model, loss)
            while True:
                yield step(model, loss)


def loss_of(name: str, model: nn.Module, precision: Precision) -> Callable[[nn.Module], Tensor]:
    """What a step of one of `MODELS` minimises, for every model of its kind."""
    _, batch, side, tokens = MODELS[name]
    device = model.device
    latents = torch.randn(batch, model.config.in_channels, side, side, device=device)
    text = torch.randn(batch, tokens, model.config.cross_attention_dim, device=device)
    timesteps = torch.full((batch,), 500, device=device)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
            predicted = model(latents, timesteps, text).sample
        return (predicted.float() - latents).square().mean()

    return loss


if __name__ == "__main__":
    main()
