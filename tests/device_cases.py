"""python tests/device_cases.py CASE FOLDER: what tests/test_devices.py runs, in a process of its own."""

import sys
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import timm
import tiny_diffusion as tiny
import torch
from PIL import Image

from vislora.checkpoint import save_checkpoint
from vislora.compose import configure
from vislora.evaluate import evaluate
from vislora.formats.detect import read_adapter
from vislora.lora import Adapters, LoraSettings, prove_alive
from vislora.lora.extraction import extract
from vislora.picture_evaluation import evaluate_pictures
from vislora.targets.timm import find_targets
from vislora.train import TrainResult, train

QUIET = ["logger.trackers=[]", "trainer.progress=false", "trainer.precision=fp32"]
PRETEND = str(pretend_gpu.DEVICE)


def core(folder: Path) -> None:
    """Adapters made on the device, or moved there, give the CPU's numbers; so do those of each sample."""
    images = torch.randn(2, 3, 32, 32)
    expected = None
    for device, moved in (("cpu", "cpu"), (PRETEND, PRETEND), ("cpu", PRETEND)):
        torch.manual_seed(0)
        small = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        model = timm.create_model("vit_tiny_patch16_224", **small).eval().to(device)
        base = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        adapters = Adapters(model)
        for name, dora in (("plain", False), ("dora", True)):
            adapters.add(name, find_targets(model, ["q", "v", "o", "mlp"]), LoraSettings(2, 4, dora=dora), ["head"])
            draws = torch.Generator().manual_seed(1)
            for parameter in [p for p in model.parameters() if p.requires_grad]:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws).to(device)
        model.to(moved)
        x = images.to(moved)
        numbers = torch.get_device_module(PRETEND).get_rng_state().clone()
        prove_alive(model, lambda model=model, x=x: model(x))
        assert torch.equal(torch.get_device_module(PRETEND).get_rng_state(), numbers)
        with torch.no_grad():
            found = [model(x)]
            adapters.activate("plain")
            found.append(model(x))
            with adapters.per_sample(["dora", "plain"]):
                found.append(model(x))
            adapters.merge()
            model.to("cpu")
            adapters.unmerge()
            model.to(moved)
            found.append(model(x))
        before = {key: value.to(moved) for key, value in base.items()}
        head = adapters.adapter("plain").trained["head"]["weight"].to(moved)
        kept = extract(before, before | {"head.weight": head}, energy=0.9).adapter.layers["head"]
        found = [tensor.cpu() for tensor in (*found, kept.lora_B @ kept.lora_A)]
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        adapters.remove("plain")
        adapters.remove("dora")
        assert all(torch.equal(value.cpu(), base[key]) for key, value in model.state_dict().items())


def recognition(folder: Path) -> None:
    """A training on the device takes the CPU's path, and goes on from a checkpoint bit for bit; so does scoring."""
    pretend_gpu.hold_no_float64()
    counts = ["data.train_per_species=2", "data.val_per_species=1", "data.test_per_species=1"]
    words = ["recipe=vit_birds", *QUIET, *counts, "trainer.epochs=2", "trainer.batch_size=16", "trainer.keep=last"]

    def run(device: str, name: str, *more: str) -> TrainResult:
        pretend_gpu.train_on(device)
        return train(configure("train", [*words, *more]), folder / name)

    one, other = run("cpu", "cpu"), run(PRETEND, "gpu")
    torch.testing.assert_close(one.test.predictions.logits, other.test.predictions.logits, rtol=0, atol=1e-3)
    dropping = ["adapter.dropout=0.2", "trainer.ema=0.5", "trainer.checkpoint_every=3"]
    whole = run(PRETEND, "whole", *dropping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vislora.trainer.save_checkpoint", _save_and_cut)
        with pytest.raises(KeyboardInterrupt):
            run(PRETEND, "cut", *dropping)
    again = run(PRETEND, "again", *dropping, f"trainer.resume={folder / 'cut'}")
    assert read_adapter(whole.artifact).equals(read_adapter(again.artifact))

    asked = [f"adapter={one.artifact}", "baselines=[zero,probe]", "corruptions=[noise]", "calibrate=true", "maps=1"]
    found = []
    for device in ("cpu", PRETEND):
        pretend_gpu.train_on(device)
        words = [*asked, "resamples=2", "precision=fp32"]
        found.append(evaluate(configure("evaluate", words), folder / f"scored_on_{device.partition(':')[0]}"))
    for rows in zip(*found, strict=True):
        torch.testing.assert_close(*(row.evaluation.predictions.logits for row in rows), rtol=0, atol=1e-3)


def _save_and_cut(folder: Path, *rest: Any) -> None:
    save_checkpoint(folder, *rest)
    if (folder / "step_00000006").is_dir():  # two steps into the second epoch
        raise KeyboardInterrupt


def text_to_image(folder: Path) -> None:
    """A denoiser and its text encoder are trained on the device as on the CPU, and draw on the way; what is drawn is
    scored there too."""
    pretend_gpu.hold_no_float64()
    tiny.stable_diffusion(folder / "words").save_pretrained(folder / "sd")
    (folder / "photos").mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (32, 32), colour).save(folder / "photos" / f"{i}.png")
        (folder / "photos" / f"{i}.txt").write_text(f"a {colour} picture")
    words = ["objective=diffusion", "model=diffusers", f"model.name={folder / 'sd'}", "adapter=unet_lora", *QUIET]
    words += ["adapter.text_encoder=true", "data=captions", f"data.root={folder / 'photos'}", "data.size=32"]
    words += ["data.val_fraction=0.25", "trainer.epochs=2", "trainer.preview_every=1", "objective.preview_steps=1"]
    losses = []
    for device in ("cpu", PRETEND):
        pretend_gpu.train_on(device)
        result = train(configure("train", words), folder / device.partition(":")[0])
        losses.append(result.validation)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
    words = [f"adapter={result.artifact}", "prompts=[a red picture, a blue picture]", "unrelated=[a white picture]"]
    words += [f"reference={folder / 'photos'}", "seeds=[0,1]", "steps=2", "size=32", "precision=fp32"]
    scored = []
    for device in ("cpu", PRETEND):
        pretend_gpu.train_on(device)
        scored.append(evaluate_pictures(configure("evaluate", words)))
    for one, other in zip(*(found.rows for found in scored), strict=True):
        assert one.each.keys() == other.each.keys()
        for key, values in one.each.items():
            torch.testing.assert_close(values, other.each[key], rtol=1e-3, atol=1e-3)


def _main(case: str, folder: str) -> Any:
    cases = {function.__name__: function for function in (core, recognition, text_to_image)}
    return cases[case](Path(folder))


if __name__ == "__main__":
    _main(*sys.argv[1:])
