"""Families that call their projections in their own ways learn, end to end, through python -m vislora.train."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from vislora.compose import configure
from vislora.formats.peft import read_peft
from vislora.recognizer import load_recognizer
from vislora.tasks import recognition
from vislora.train import train

FAMILIES = {  # timm's name, pixels (its own for None), and what makes it small
    "BEiT": ("beit_base_patch16_224", 32, {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    "EVA-02": ("eva02_tiny_patch14_224", 28, {"patch_size": 7, "depth": 2}),
    "CaiT": ("cait_xxs24_224", 32, {"patch_size": 8, "depth": 2}),
    "PVT v2": ("pvt_v2_b0", 64, {}),
    "Twins": ("twins_svt_small", 64, {}),
    "MaxViT": ("test_maxvit", None, {}),
    "EfficientFormer": ("efficientformer_l1", None, {}),
    "SigLIP's attention pool": ("test_vit3", None, {}),
    "LambdaNet": ("lambda_resnet26t", 64, {}),
    "HaloNet": ("eca_halonext26ts", 256, {}),
}
WITHOUT_O = {"lambda_resnet26t", "eca_halonext26ts"}
RUN = ["trainer.epochs=2", "trainer.batch_size=4", "trainer.progress=false", "trainer.precision=fp32", "optim.lr=5e-3"]
BIRDS = ["data=birds", "data.species=[blue jay,mallard,barn owl]", "data.size=32"]
FEW = ["data.train_per_species=8", "data.val_per_species=2", "data.test_per_species=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "arguments"), FAMILIES.values(), ids=FAMILIES.keys())
def test_family_learns_and_its_written_adapter_gives_the_trained_logits(monkeypatch, tmp_path, name, size, arguments):
    tasks = []
    prepare = recognition.prepare
    monkeypatch.setattr(recognition, "prepare", lambda *given: tasks.append(prepare(*given)) or tasks[-1])
    base = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    resized = {"img_size": size} if arguments else {}  # the others are built the same for pictures of any size
    fresh = timm.create_model(name, num_classes=0, **arguments, **resized)
    with torch.no_grad():
        for parameter in fresh.parameters():  # as in a pretrained model no branch is multiplied by zero
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1)
    save_file(fresh.state_dict(), base)

    model = ["model=timm", f"model.name={name}", f"model.weights={base}"]
    model += [f"model.img_size={size}"] if size else []
    model += [f"+model.args={{{','.join(f'{key}:{value}' for key, value in arguments.items())}}}"] if arguments else []
    targets = "adapter.targets=[qkv]" if name in WITHOUT_O else "adapter.targets=[qkv,o]"
    words = [*model, *BIRDS, *FEW, *RUN, targets, "adapter.rank=2", "logger.trackers=[]"]
    artifact = train(configure("train", words), tmp_path / "run").artifact

    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert all(weights.lora_B.any() for weights in read_peft(artifact).layers.values())
    recognizer = load_recognizer(artifact)
    images = torch.randn(2, 3, *[recognizer.preprocessing.size] * 2)
    with torch.no_grad():
        assert torch.equal(recognizer.model.eval()(images), tasks[0].model.eval()(images))
