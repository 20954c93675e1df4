"""python benchmarks/step_profile.py [--model vit_tiny_patch16_224] [--variant NAME] [--batch 8] [--bf16] [--rounds 8]

Where the time goes by which a vislora step exceeds the frozen limit: what each operator takes itself, in milliseconds a
step, in both, by the difference. The two take turns. Products are told apart by the shapes that go in.
"""

import argparse
from collections import Counter
from copy import deepcopy
from functools import partial

import timm
import torch
from interleaved import LIMIT, machine
from step_time import VARIANTS, step_loss
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--variant", default="vislora", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    base = timm.create_model(options.model, num_classes=10)
    models = {title: VARIANTS[title](deepcopy(base)).train() for title in (LIMIT, options.variant)}
    images = torch.randn(options.batch, 3, 224, 224)
    loss = partial(step_loss, images=images, dtype=torch.bfloat16 if options.bf16 else None)
    spent: dict[str, Counter] = {title: Counter() for title in models}
    for turn in range(options.rounds + 2):
        for title, model in models.items():
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                loss(model).backward()
            model.zero_grad(set_to_none=True)
            for event in seen.key_averages(group_by_input_shape=True) if turn >= 2 else ():
                shapes = " x ".join(str(shape) for shape in event.input_shapes if len(shape) == 2)
                name = f"{event.key} {shapes}" if event.key in PRODUCTS else event.key
                spent[title][name] += event.self_cpu_time_total / 1e3 / options.rounds
    print(f"{machine()}; {options.model}, batch {options.batch}, {'bf16' if options.bf16 else 'fp32'}")
    print(f"{'limit':>8}{options.variant:>22}{'more':>8}")
    more = {name: spent[options.variant][name] - spent[LIMIT][name] for name in set().union(*spent.values())}
    for name in sorted(more, key=lambda name: -abs(more[name]))[:20]:
        print(f"{spent[LIMIT][name]:8.1f}{spent[options.variant][name]:22.1f}{more[name]:8.1f}  {name}")


if __name__ == "__main__":
    main()
