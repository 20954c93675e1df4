"""Adapter folders open in PEFT with the same logits, PEFT's open here, and what would be lost is refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.formats.peft import CONFIG, TENSORS, read_peft, write_peft
from vislora.lora import Adapter, Adapters, LoraSettings, TargetLayer
from vislora.targets.timm import find_targets

peft = pytest.importorskip("peft")


def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        return timm.create_model("vit_tiny_patch16_224", **size).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module) -> None:
    """Random numbers in everything trainable, as training would leave them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_here(
    projections=("q", "v"), trained=("head",), rslora: bool = False, dora: bool = False
) -> tuple[nn.Module, Adapter]:
    model = vit()
    adapters = Adapters(model)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapters.add("it", find_targets(model, projections), LoraSettings(3, 5.0, 0.1, rslora, dora), trained)
    train(model)
    value = adapters.adapter("it")
    return model, Adapter(value.layers, value.trained, value.dropout, {"classes": ["wren", "tit"]})


def loaded_here(adapter: Adapter) -> nn.Module:
    model = vit()
    Adapters(model).load("it", adapter)
    return model


def opened_by_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(vit(), str(folder)).eval()


def trained_by_peft(folder: Path, **config) -> nn.Module:
    model = peft.get_peft_model(vit(), peft.LoraConfig(**config)).eval()
    train(model)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_peft(trained_here()[1], folder)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A good folder to spoil."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


# --- From here to PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projections", "rslora", "trained"),
    [
        (("qkv", "o"), False, ("head",)),
        (("qkv", "o"), True, ()),
        (("q", "v"), False, ("head",)),
        (("q", "v"), True, ("norm", "head")),
        (("q", "v"), False, ()),
        (("k", "o", "mlp"), False, ("head",)),
        (("k", "o", "mlp"), True, ("head",)),
    ],
    ids=lambda value: {True: "rslora", False: "lora"}.get(value) or ",".join(value) or "no head",
)
def test_written_folder_opened_by_peft_gives_the_same_logits(tmp_path, images, projections, rslora, trained):
    model, adapter = trained_here(projections, trained, rslora)
    write_peft(adapter, tmp_path)
    logits = model(images)
    assert (logits - vit()(images)).abs().max() > 0.1
    assert torch.allclose(opened_by_peft(tmp_path)(images), logits, atol=1e-5)


@pytest.mark.parametrize("projections", [("qkv", "o"), ("q", "v"), ("k", "mlp")], ids=",".join)
def test_dora_opened_by_peft_gives_the_same_logits(tmp_path, images, projections):
    model, adapter = trained_here(projections, rslora=True, dora=True)
    write_peft(adapter, tmp_path)
    logits = model(images)
    assert (logits - vit()(images)).abs().max() > 0.1
    theirs = opened_by_peft(tmp_path)
    assert torch.allclose(theirs(images), logits, atol=1e-5)
    assert theirs.peft_config["default"].use_dora
    assert (
        read_peft(tmp_path).layers["blocks.1." + ("attn.qkv" if "k" not in projections else "mlp.fc1")].magnitude.any()
    )
    assert torch.allclose(loaded_here(read_peft(tmp_path))(images), logits, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("trained", [(), ("head", "norm")], ids=["no head", "head"])
def test_trained_biases_opened_by_peft_give_the_same_logits(tmp_path, images, bias, trained):
    model = vit()
    adapters = Adapters(model)
    adapters.add("it", find_targets(model, ["q", "o"]), LoraSettings(3, 5.0, bias=bias), trained)
    train(model)
    adapter = adapters.adapter("it")
    assert ("blocks.0.norm1.bias" in adapter.biases) == (bias == "all")
    write_peft(adapter, tmp_path)
    theirs = opened_by_peft(tmp_path)
    assert theirs.peft_config["default"].bias == bias
    assert torch.allclose(theirs(images), model(images), atol=1e-5)
    assert read_peft(tmp_path).biases.keys() == adapter.biases.keys()
    assert torch.allclose(loaded_here(read_peft(tmp_path))(images), model(images), atol=1e-5)


def test_biases_that_stand_apart_from_a_fused_qkv_are_among_all_of_a_models(tmp_path, images):
    def beit() -> nn.Module:
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
        return timm.create_model("beit_base_patch16_224", num_classes=5, **size).eval()

    model = beit()
    adapters = Adapters(model)
    adapters.add("it", find_targets(model, ["o"]), LoraSettings(3, 5.0, bias="all"))  # PEFT is dead on qkv
    train(model)
    assert {"blocks.0.attn.q_bias", "blocks.1.attn.v_bias"} <= adapters.adapter("it").biases.keys()
    write_peft(adapters.adapter("it"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(beit(), str(tmp_path)).eval()
    assert torch.allclose(theirs(images), model(images), atol=1e-5)
    mine = beit()
    Adapters(mine).load("it", read_peft(tmp_path))
    assert torch.equal(mine(images), model(images))


def test_rank_and_alpha_patterns_opened_by_peft_give_the_same_logits(tmp_path, images):
    model = vit()
    adapters = Adapters(model)
    patterns = {
        "rank_pattern": {r"blocks\.1\.attn\.qkv": 7, r"1\.mlp\.fc1": 5, "fc1": 2},
        "alpha_pattern": {r"1\.mlp\.fc[12]": 11.0},
    }
    adapters.add("it", find_targets(model, ["qkv", "mlp"]), LoraSettings(3, 5.0, **patterns), ["head"])
    train(model)
    assert model.blocks[1].attn.qkv.lora.rank == 7
    assert model.blocks[0].attn.qkv.lora.rank == 3
    assert [model.blocks[b].mlp.fc1.lora.rank for b in (0, 1)] == [2, 5]
    assert [model.blocks[b].mlp.fc2.lora.alpha for b in (0, 1)] == [5.0, 11.0]
    write_peft(adapters.adapter("it"), tmp_path)
    assert torch.allclose(opened_by_peft(tmp_path)(images), model(images), atol=1e-5)
    # PEFT gives the same ranks and alphas to the same layers for the same patterns
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc1", "fc2"], **patterns)
    theirs = peft.get_peft_model(vit(), config).base_model.model
    for path, low in ((n.removesuffix(".lora"), m) for n, m in model.named_modules() if n.endswith(".lora")):
        layer = theirs.get_submodule(path)
        assert (layer.r["default"], layer.lora_alpha["default"]) == (low.rank, low.alpha), path


class TwoTowers(nn.Module):
    """The name of each layer of `transformer` is the end of one of `visual.transformer`, as in CLIP's first code."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.visual = nn.ModuleDict({"transformer": nn.ModuleDict({"c_fc": nn.Linear(6, 6)})})
            self.transformer = nn.ModuleDict({"c_fc": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer["c_fc"](self.visual["transformer"]["c_fc"](x).relu())


@pytest.mark.parametrize("other", ["visual.transformer.c_fc", r"^transformer\.c_fc"])
def test_rank_and_alpha_of_a_layer_whose_name_ends_anothers_are_its_own_in_peft(tmp_path, other):
    model, x = TwoTowers(), torch.randn(3, 6)
    names = ["visual.transformer.c_fc", "transformer.c_fc"]
    settings = LoraSettings(2, 4, rank_pattern={"visual.transformer.c_fc": 3}, alpha_pattern={other: 9})
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer(name) for name in names], settings)
    train(model)
    assert [adapters.adapter("it").layers[name].rank for name in names] == [3, 2]
    write_peft(adapters.adapter("it"), tmp_path)
    opened = peft.PeftModel.from_pretrained(TwoTowers(), str(tmp_path)).eval()
    torch.testing.assert_close(opened(x), model(x))


def test_head_of_a_written_folder_belongs_to_the_adapter_in_peft(written, images):
    model = opened_by_peft(written)
    with model.disable_adapter():
        assert torch.allclose(model(images), vit()(images), atol=1e-6)


def test_folder_of_a_mixed_rank_adapter_opened_by_peft_gives_the_same_logits(tmp_path, images):
    parts = [trained_here(("q", "v"))[1], trained_here(("o",))[1], trained_here(("mlp",), rslora=False)[1]]
    layers = {name: weights for part in parts for name, weights in part.layers.items()}
    adapter = Adapter(layers, parts[0].trained)
    write_peft(adapter, tmp_path)
    assert len({weights.as_one_pair().rank for weights in layers.values()}) == 2
    assert torch.allclose(opened_by_peft(tmp_path)(images), loaded_here(adapter)(images), atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_folder_of_an_adapted_convolution_opened_by_peft_gives_the_same_output(tmp_path, dora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1))
    model = copy.deepcopy(base)
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0", ((0, 2), (4, 6)))], LoraSettings(2, 3.0, dora=dora))
    train(model)
    write_peft(adapters.adapter("it"), tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()(x), model(x), atol=1e-5)


def test_written_folder_reads_back_equal_with_dropout_and_about(tmp_path, images):
    model, adapter = trained_here(("qkv", "o", "mlp"))
    write_peft(adapter, tmp_path)
    back = read_peft(str(tmp_path))
    assert back.equals(adapter)
    assert back.dropout == adapter.dropout == 0.1
    assert back.about == {"classes": ["wren", "tit"]}
    assert torch.equal(loaded_here(back)(images), model(images))


@pytest.mark.parametrize("model", ["vit", None, {"name": "vit"}])
def test_what_is_told_of_the_base_model_may_be_anything(tmp_path, model):
    _, adapter = trained_here()
    write_peft(replace(adapter, about={"model": model}), tmp_path)
    assert read_peft(tmp_path).about == {"model": model}


def test_written_partial_pairs_read_back_as_the_same_function(written, images):
    model, adapter = trained_here()
    back = read_peft(written)
    assert not back.equals(adapter)
    assert all(weights.rows is None and weights.rank == 6 for weights in back.layers.values())
    assert torch.allclose(loaded_here(back)(images), model(images), atol=1e-5)


def test_writing_leaves_no_part_files_and_overwrites_what_was_there(folder):
    other = trained_here(("o",))[1]
    write_peft(other, folder)
    assert read_peft(folder).equals(other)
    assert not list(folder.glob("*.part"))


def test_header_says_it_is_a_pytorch_file(written):
    raw = (written / TENSORS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_adapter_without_layers_cannot_be_written(tmp_path):
    with pytest.raises(AdapterError, match="at least one LoRA layer"):
        write_peft(Adapter({}, {"head": {"weight": torch.ones(2, 2)}}), tmp_path)


def test_adapter_that_mixes_lora_and_rslora_cannot_be_written(tmp_path):
    layers = trained_here(("q",))[1].layers | trained_here(("o",), rslora=True)[1].layers
    with pytest.raises(AdapterError, match="LoRA and rsLoRA"):
        write_peft(Adapter(layers), tmp_path)


def test_fully_trained_module_with_submodules_reads_back_equal(tmp_path):
    value = trained_here(("o",))[1]
    adapter = Adapter(value.layers, {"head": {"0.weight": torch.ones(2), "0.bias": torch.ones(2)}})
    write_peft(adapter, tmp_path)
    assert read_peft(tmp_path).equals(adapter)


# --- From PEFT to here ------------------------------------------------------------------------------------------------

TRAINED_BY_PEFT = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["qkv", "attn.proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["qkv", "fc1", "fc2"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["qkv", "fc1", "attn.proj"],
        "rank_pattern": {"qkv": 2, "blocks.1.mlp.fc1": 5},
        "alpha_pattern": {"blocks.0.attn.qkv": 9, r"blocks\.\d\.attn\.proj": 1},
    },
    "patterns with rslora": {
        "target_modules": ["qkv", "fc2"],
        "rank_pattern": {"fc2": 3},
        "alpha_pattern": {"1.attn.qkv": 5},
        "use_rslora": True,
    },
    "head": {"r": 2, "target_modules": ["qkv"], "modules_to_save": ["head"]},
    "head and norm": {"r": 2, "target_modules": r".*\.(qkv|fc1)", "modules_to_save": ["head", "fc_norm", "norm"]},
    "dora": {"r": 3, "target_modules": ["qkv", "fc1", "patch_embed.proj"], "use_dora": True, "use_rslora": True},
    "biases of adapted layers": {"r": 2, "target_modules": ["qkv", "patch_embed.proj"], "bias": "lora_only"},
    "all biases": {"r": 2, "target_modules": ["qkv", "fc1"], "bias": "all"},
    "all biases and a head": {"r": 2, "target_modules": ["qkv"], "bias": "all", "modules_to_save": ["head", "norm"]},
    "patch embedding": {"r": 2, "target_modules": ["patch_embed.proj", "qkv"]},
    "parameters": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["attn.proj"],
        "target_parameters": ["qkv.weight", "fc1.weight"],
        "alpha_pattern": {"qkv": 3, "fc1.weight": 2, "attn.proj": 1},
    },
    "least singular vectors": {"r": 2, "target_modules": ["qkv"], "init_lora_weights": "mica"},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # it overlooks parameters
@pytest.mark.parametrize("config", TRAINED_BY_PEFT.values(), ids=TRAINED_BY_PEFT.keys())
def test_adapter_trained_by_peft_gives_the_same_logits_here(tmp_path, images, config):
    theirs = trained_by_peft(tmp_path, **config)(images)
    assert (theirs - vit()(images)).abs().max() > 0.05
    assert torch.allclose(loaded_here(read_peft(tmp_path))(images), theirs, atol=1e-5)


def test_modules_that_peft_trains_for_the_end_of_their_name_are_read(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("qkv", "head", "aux_head")})
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    train(theirs)
    theirs.save_pretrained(str(tmp_path))
    trained = read_peft(tmp_path).trained
    assert trained.keys() == {"head", "aux_head"}
    for name, state in trained.items():
        assert torch.equal(state["weight"], theirs.base_model.model[name].modules_to_save["default"].weight)


def test_adapter_trained_by_peft_survives_the_way_here_and_back(tmp_path, images):
    logits = trained_by_peft(tmp_path / "a", **TRAINED_BY_PEFT["patterns"])(images)
    write_peft(read_peft(tmp_path / "a"), tmp_path / "b")
    assert torch.allclose(opened_by_peft(tmp_path / "b")(images), logits, atol=1e-5)


# --- What would be lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"), [(None, "has no DoRA magnitude"), (torch.ones(3), r"has DoRA magnitudes of shape \[3\]")]
)
def test_dora_without_a_magnitude_for_every_row_is_refused(tmp_path, value, found):
    trained_by_peft(tmp_path, target_modules=["qkv"], use_dora=True)
    edit_tensors(tmp_path, **{f"{QKV}.lora_magnitude_vector": value})
    with pytest.raises(AdapterError, match=rf"blocks.0.attn.qkv {found}"):
        read_peft(tmp_path)


def test_adapter_that_mixes_layers_with_and_without_dora_cannot_be_written(tmp_path):
    layers = trained_here(("q",))[1].layers | trained_here(("o",), dora=True)[1].layers
    with pytest.raises(AdapterError, match="with and without DoRA"):
        write_peft(Adapter(layers), tmp_path)


def test_biases_that_an_old_peft_did_not_save_are_missed(tmp_path):
    trained_by_peft(tmp_path, **TRAINED_BY_PEFT["biases of adapted layers"])
    edit_tensors(tmp_path, **{key: None for key in load_file(tmp_path / TENSORS) if key.endswith(".bias")})
    with pytest.raises(AdapterError, match=r"bias='lora_only' says that biases were trained, and .* holds none"):
        read_peft(tmp_path)


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT's doubt about its own bias
def test_bias_on_lora_B_is_refused(tmp_path):
    trained_by_peft(tmp_path, target_modules=["qkv"], lora_bias=True)
    with pytest.raises(AdapterError, match="bias on lora_B"):
        read_peft(tmp_path)


def test_other_peft_methods_are_refused_by_name(tmp_path):
    config = peft.IA3Config(target_modules=["qkv"], feedforward_modules=[])
    peft.get_peft_model(vit(), config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="peft_type is 'IA3'; only LORA"):
        read_peft(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisation_that_changes_the_base_weights_is_refused(tmp_path, init):
    trained_by_peft(tmp_path, target_modules=["qkv"], init_lora_weights=init)
    with pytest.raises(AdapterError, match=init):
        read_peft(tmp_path)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM")
def test_update_that_waits_for_a_prompts_tokens_is_refused(tmp_path):
    trained_by_peft(tmp_path, target_modules=["qkv"], alora_invocation_tokens=[1, 2])
    with pytest.raises(AdapterError, match="alora_invocation_tokens"):
        read_peft(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "layer_norms"},
        {"fan_in_fan_out": True},
        {"megatron_config": {"hidden_size": 48}},
        {"trainable_token_indices": [3]},
        {"use_bdlora": {"target_modules_bd_a": ["qkv"], "nblocks": 2}},
        {"arrow_config": {"top_k": 3}},
        {"layer_replication": [[0, 1], [0, 1]]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_setting_that_would_change_what_the_tensors_mean_is_refused_by_name(folder, setting):
    edit_config(folder, **setting)
    with pytest.raises(AdapterError, match=rf"{next(iter(setting))}=.* can't be read; it would be lost"):
        read_peft(folder)


@pytest.mark.parametrize("key", ["modules_to_save", "target_parameters"])
@pytest.mark.parametrize("names", ["head", 3, [["head"]]])
def test_names_that_are_no_list_are_refused(folder, key, names):
    edit_config(folder, **{key: names})
    with pytest.raises(AdapterError, match=rf"{key} is .*; a list of names was expected"):
        read_peft(folder)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=missing):
        read_peft(folder)


def test_alpha_that_isnt_in_the_config_is_the_one_that_peft_takes(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["lora_alpha"]
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {}}))
    assert {weights.alpha for weights in read_peft(folder).layers.values()} == {peft.LoraConfig().lora_alpha}


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999], ids="{} kept".format)
def test_truncated_tensors_are_refused(folder, kept):
    raw = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(raw[: kept if isinstance(kept, int) else int(kept * len(raw))])
    with pytest.raises(AdapterError, match=f"{TENSORS} can't be read"):
        read_peft(folder)


@pytest.mark.parametrize("content", [b"", b"{'r': 8}", b"\xff\xfe\x00", b"not json", b"[" * 10**5, b"1" * 5000])
def test_config_that_is_not_json_is_refused(folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=f"{CONFIG} can't be read"):
        read_peft(folder)


def test_config_that_is_no_object_is_refused(folder):
    (folder / CONFIG).write_text("[1, 2]")
    with pytest.raises(AdapterError, match="holds a list; an object was expected"):
        read_peft(folder)


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / TENSORS) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / TENSORS)


QKV = "base_model.model.blocks.0.attn.qkv"


def test_head_with_nan_is_named(folder):
    edit_tensors(folder, **{"base_model.model.head.bias": torch.tensor([0.0, torch.nan, 0.0])})
    with pytest.raises(AdapterError, match=r"'base_model\.model\.head\.bias' holds NaN; the training that wrote it"):
        read_peft(folder)


@pytest.mark.parametrize("key", ["head.weight", "base_model.model.embed.lora_embedding_A"])
def test_unknown_tensor_is_named(folder, key):
    edit_tensors(folder, **{key: torch.ones(2)})
    with pytest.raises(AdapterError, match=f"unexpected tensor '{key}'"):
        read_peft(folder)


def test_magnitude_that_the_settings_dont_know_is_named(folder):
    edit_tensors(folder, **{f"{QKV}.lora_magnitude_vector": torch.ones(144)})
    with pytest.raises(AdapterError, match=r"use_dora is False, and blocks\.0\.attn\.qkv has a DoRA magnitude"):
        read_peft(folder)


def test_layer_of_rank_zero_is_named(folder):
    edit_tensors(folder, **{f"{QKV}.lora_A.weight": torch.ones(0, 48), f"{QKV}.lora_B.weight": torch.ones(144, 0)})
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has rank 0"):
        read_peft(folder)


def test_lora_A_without_its_lora_B_is_named(folder):
    edit_tensors(folder, **{f"{QKV}.lora_B.weight": None})
    with pytest.raises(AdapterError, match=r"blocks.0.attn.qkv has no lora_B"):
        read_peft(folder)


def test_lora_A_and_B_of_different_ranks_are_named(folder):
    edit_tensors(folder, **{f"{QKV}.lora_B.weight": torch.ones(144, 5)})
    with pytest.raises(AdapterError, match=r"blocks.0.attn.qkv has matrices of shapes \[6, 48\] and \[144, 5\]"):
        read_peft(folder)


def test_lora_B_without_its_lora_A_is_named(folder):
    edit_tensors(folder, **{f"{QKV}.lora_A.weight": None})
    with pytest.raises(AdapterError, match=r"blocks.0.attn.qkv has no lora_A"):
        read_peft(folder)


def test_folder_without_lora_tensors_is_refused(folder):
    save_file({"base_model.model.head.weight": torch.ones(5, 48)}, folder / TENSORS)
    with pytest.raises(AdapterError, match="holds no lora_A tensors"):
        read_peft(folder)


def test_adapter_of_another_model_is_refused_by_the_first_module_that_is_missing(folder):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(AdapterError, match=r"Sequential has no module 'blocks.0.attn.qkv'"):
        Adapters(model).load("it", read_peft(folder))


@pytest.mark.parametrize("alpha", ["eight", [8], math.nan, pytest.param(10**400, id="huge")])
def test_alpha_that_is_no_number_is_refused(folder, alpha):
    edit_config(folder, lora_alpha=alpha)
    with pytest.raises(AdapterError, match="lora_alpha"):
        read_peft(folder)
