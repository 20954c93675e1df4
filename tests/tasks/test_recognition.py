"""A timm model is adapted as it is set, or refused, before anything is trained; and what a run is of is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vislora.compose import configure
from vislora.config.adapter import Bias, FullAdapter, LoraAdapter, ProbeAdapter
from vislora.config.model import ModelConfig
from vislora.config.training import Precision
from vislora.errors import AdapterError, ConfigError, ModelError
from vislora.formats.peft import write_peft
from vislora.models.vit import build_vit
from vislora.tasks.recognition import adapt, prepare
from vislora.tasks.task import FILES, PICTURES, Task

LABELS = {"0": "wren", "1": "owl", "2": "wren", "3": "owl", "4": "wren", "5": "owl"}  # the last two to validate on


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in LABELS:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def prepared(root: Path, *words: str, **others: str) -> Task:
    """With other labels for some of the pictures."""
    rows = [f"{n}.png,{label},{'val' if n in '45' else 'train'}" for n, label in (LABELS | others).items()]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    common = ["model=timm", "model.name=test_vit", "model.weights=random", "model.img_size=32", "data=csv"]
    config = configure("train", [*common, f"data.root={root}", "trainer.batch_size=2", *words])
    return prepare(config, Precision.fp32, Accelerator(cpu=True), root / "unused")


def test_the_contents_of_a_run_are_the_labels_too_of_what_is_learned_and_validated(photos):
    contents = [prepared(photos, **others).contents for others in ({}, {"2": "owl"}, {"5": "wren"}, {})]
    assert contents[0] == contents[3]
    assert len({content[FILES] for content in contents}) == 3
    assert len({content[PICTURES] for content in contents}) == 1


@pytest.mark.parametrize("name", ["0", "4"], ids=["learned", "validated"])
def test_another_picture_under_an_old_name_is_other_contents(photos, name):
    before = prepared(photos).contents
    Image.new("RGB", (16, 16), "red").save(photos / f"{name}.png")
    after = prepared(photos).contents
    assert (before[FILES] == after[FILES], before[PICTURES] == after[PICTURES]) == (True, False)


def test_the_head_is_told_to_the_trainer(photos):
    assert prepared(photos).head == ("head.",)


def test_a_probe_trains_the_head_alone_and_full_fine_tuning_everything():
    for option, expected in ((ProbeAdapter(), {"head.weight", "head.bias"}), (FullAdapter(), None)):
        model = timm.create_model("test_vit", img_size=32, num_classes=2)
        assert adapt(model, option) is None
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == (expected or dict(model.named_parameters()).keys())


@pytest.mark.filterwarnings("ignore:.* lacks attn_pool")
def test_what_the_weights_have_nothing_of_travels_in_the_adapter(photos, tmp_path):
    """A pooling that the settings add is drawn at random, so PEFT would draw another one."""
    weights = photos / "base.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), weights)
    assert prepared(photos, "model.pool=map", f"model.weights={weights}").head == ("head.", "attn_pool.")
    config = ModelConfig("test_vit", str(weights), pool="map", img_size=32)
    probed = build_vit(config, 2)
    adapt(probed, ProbeAdapter())
    trained = {name.partition(".")[0] for name, p in probed.named_parameters() if p.requires_grad}
    assert trained == {"head", "attn_pool"}
    model = build_vit(config, 2)
    adapters = adapt(model, LoraAdapter(rank=2))
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) / 20)
    write_peft(adapters.adapter("default"), tmp_path / "adapter")
    torch.manual_seed(1)
    theirs = peft.PeftModel.from_pretrained(build_vit(config, 2), str(tmp_path / "adapter")).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    plain = build_vit(replace(config, pool=None), 2)
    write_peft(adapt(plain, LoraAdapter(rank=2)).adapter("default"), tmp_path / "plain")
    with pytest.raises(AdapterError, match=r"plain holds no attn_pool \(which starts at random\)"):
        prepared(photos, "model.pool=map", f"model.weights={weights}", f"adapter.start={tmp_path / 'plain'}")


@pytest.mark.filterwarnings("ignore:.* lacks reg_token")
def test_a_parameter_that_starts_at_random_and_no_adapter_could_hold_is_refused(photos):
    small = {"depth": 1, "embed_dim": 12, "no_embed_class": True}
    save_file(timm.create_model("vit_tiny_patch16_224", **small).state_dict(), photos / "base.safetensors")
    config = ModelConfig("vit_tiny_patch16_224", str(photos / "base.safetensors"), args=small | {"reg_tokens": 2})
    adapt(build_vit(config, 2), FullAdapter())
    with pytest.raises(AdapterError, match=r"lack reg_token, which starts at random, .* \(adapter=full\)"):
        adapt(build_vit(config, 2), LoraAdapter(rank=2))


def test_an_adapter_to_go_on_from_gets_the_dropout_that_is_set(photos):
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    write_peft(adapt(model, LoraAdapter(rank=2, dropout=0.1)).adapter("default"), photos / "start")
    task = prepared(photos, f"adapter.start={photos / 'start'}", "adapter.dropout=0.3")
    assert {m.lora.dropout for m in task.model.modules() if hasattr(m, "lora")} == {0.3}


@pytest.mark.parametrize(("wish", "told"), [("trained=[norms]", "norm1 "), ("bias=all", "patch_embed.proj.bias ")])
def test_what_is_to_be_trained_besides_has_to_be_in_an_adapter_to_go_on_from(photos, wish, told):
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    write_peft(adapt(model, LoraAdapter(rank=2)).adapter("default"), photos / "start")
    with pytest.raises(AdapterError, match=rf"adapter\.start=.* holds no .*{told}\(adapter\.{wish[:4]}"):
        prepared(photos, f"adapter.start={photos / 'start'}", f"adapter.{wish}")
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    both = LoraAdapter(rank=2, trained=["norms"], bias=Bias.all)
    write_peft(adapt(model, both).adapter("default"), photos / "whole")
    prepared(photos, f"adapter.start={photos / 'whole'}", f"adapter.{wish}")


@pytest.mark.parametrize("adapter", ["lora", "full", "probe"])
def test_a_size_that_the_model_was_not_built_for_is_refused(photos, adapter):
    words = ["model.name=test_maxvit", "model.img_size=40", f"adapter={adapter}"]
    with pytest.raises(ModelError, match="can't take pictures of 40 pixels"):
        prepared(photos, *words)


def test_passes_of_one_picture_are_refused_where_a_trained_batchnorm_needs_more(photos):
    levit = "{embed_dim:[16,24,32],num_heads:[2,2,2],depth:[1,1,1],key_dim:8}"
    words = ["model.name=levit_128s", f"+model.args={levit}", "model.img_size=64", "trainer.accumulation=2"]
    prepared(photos, *words)
    with pytest.raises(ConfigError, match="is a BatchNorm that is trained"):
        prepared(photos, *words, "adapter.trained=[norms]")


def test_all_biases_are_not_trained_further_where_the_start_has_those_of_its_layers(photos):
    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    write_peft(adapt(model, LoraAdapter(rank=2, bias=Bias.lora_only)).adapter("default"), photos / "start")
    prepared(photos, f"adapter.start={photos / 'start'}", "adapter.bias=lora_only")
    with pytest.raises(AdapterError, match=r"holds no patch_embed\.proj\.bias \(adapter\.bias=all\)"):
        prepared(photos, f"adapter.start={photos / 'start'}", "adapter.bias=all")


def test_norms_are_trained_where_they_are_asked_for():
    model = timm.create_model("test_vit", num_classes=2)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    adapter = adapt(model, LoraAdapter(rank=2, trained=["norms"])).adapter("default")
    assert adapter.trained.keys() == {"head", *norms}


def test_adapter_that_cannot_move_the_logits_is_refused():
    model = timm.create_model("test_vit", num_classes=2)
    model.blocks[1].attn.forward = lambda x, **_: x
    with pytest.raises(AdapterError, match=r"can't move the output: blocks\.1\.attn\.qkv"):
        adapt(model, LoraAdapter(rank=2))
