"""build_vit makes timm models of all families for pictures of the wanted size."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

from vislora.config.model import ModelConfig
from vislora.errors import ModelError
from vislora.models.vit import EMBEDDED, build_vit, head_names, preprocessing, save_vit, weights_hash


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 64), ("vit_tiny_patch16_224", 32), ("test_maxvit", 96), ("levit_128s", 64), ("pvt_v2_b0", 64)],
)
def test_model_is_made_for_pictures_of_the_wanted_size(name, size):
    model = build_vit(ModelConfig(name, "random", size), 3)
    assert preprocessing(model).size == size
    assert model(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize(("size", "remedy"), [(100, "give 96 or 112"), (8, "give 16")])
def test_size_of_which_patches_would_leave_a_rest_is_refused(size, remedy):
    with pytest.raises(ModelError, match=rf"img_size={size} isn't a multiple of the model's patches of 16.*{remedy}$"):
        build_vit(ModelConfig("test_vit", "random", size), 3)


def test_size_that_patches_dont_divide_is_fine_where_the_model_pads_it():
    model = build_vit(ModelConfig("test_vit", "random", 100, args={"dynamic_img_pad": True}), 3)
    assert model(torch.randn(1, 3, 100, 100)).shape == (1, 3)


def test_pictures_are_prepared_as_timm_has_it(tmp_path):
    wanted = {"crop_mode": "squash", "crop_pct": 0.9, "interpolation": "bilinear"}
    model = timm.create_model("test_vit", pretrained_cfg_overlay=wanted)
    mine = preprocessing(model).to_dict()
    assert wanted.items() <= mine.items()
    assert preprocessing(model, 0.7) == replace(preprocessing(model), crop_pct=0.7)
    own = {"crop_mode": "border", "crop_pct": 0.8, "interpolation": "bicubic"}
    own |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    save_vit(model, tmp_path / "model", {"preprocessing": mine | own})
    saved = timm.create_model(f"local-dir:{tmp_path / 'model'}")
    found = resolve_data_config({}, model=saved)
    assert {key: found[key] for key in own} == own


def test_model_is_in_eval_mode_and_drops_as_many_paths_as_are_set():
    model = build_vit(ModelConfig("test_vit", "random", drop_path=0.3), 3)
    assert not any(module.training for module in model.modules())
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])


def test_other_than_three_channels_are_refused():
    with pytest.raises(ModelError, match=r"model\.args\.in_chans=1: pictures have three channels here"):
        build_vit(ModelConfig("test_vit", "random", args={"in_chans": 1}), 3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"args": {"num_classes": 7}}, "num_classes=7, and the number of classes is 3"),
        ({"args": {"img_size": 64}, "img_size": 32}, "img_size=64, and model.img_size is 32"),
        ({"args": {"global_pool": "avg"}, "pool": "token"}, "global_pool=avg, and model.pool is token"),
        ({"args": {"drop_path_rate": 0.2}, "drop_path": 0.1}, "drop_path_rate=0.2, and model.drop_path is 0.1"),
        ({"args": {"checkpoint_path": "old.pth"}}, "checkpoint_path=old.pth: say by model.weights"),
    ],
)
def test_arguments_that_go_against_other_settings_are_refused(settings, told):
    with pytest.raises(ModelError, match=rf"model\.args\.{told}"):
        build_vit(ModelConfig("test_vit", "random", **settings), 3)


def test_a_size_among_the_arguments_is_refused_where_it_would_be_lost():
    given = {"args": {"img_size": 64}}
    assert preprocessing(build_vit(ModelConfig("test_vit", "random", **given), 3)).size == 64
    with pytest.raises(ModelError, match=r"resnet10t .*: it has no argument img_size; give model\.img_size"):
        build_vit(ModelConfig("resnet10t", "random", **given), 3)


def test_what_is_said_of_the_weights_pictures_counts_with_a_size_too():
    overlay = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    model = build_vit(ModelConfig("test_vit", "random", 64, args={"pretrained_cfg_overlay": overlay}), 3)
    assert preprocessing(model).to_dict().items() >= (overlay | {"size": 64}).items()


def test_pictures_that_arent_square_are_refused():
    model = timm.create_model("test_vit", img_size=(64, 32))
    with pytest.raises(
        ModelError, match=r"pictures of 64x32, and only square ones are supported; give model\.img_size"
    ):
        preprocessing(model)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_vit", ["head"]),
        ("levit_128s", ["head.linear", "head_dist.linear"]),
        ("resnet50_clip", ["head.proj"]),
        ("crossvit_tiny_240", ["head.0", "head.1"]),
    ],
)
def test_classifiers_are_found_by_their_names(name, head):
    model = build_vit(ModelConfig(name, "random"), 3)
    assert head_names(model) == head
    assert {model.get_submodule(part).out_features for part in head} == {3}


def test_encoder_without_a_classifier_is_refused():
    with pytest.raises(ModelError, match="gemma4_vit_167m_enc is an encoder of features without a classifier"):
        build_vit(ModelConfig("gemma4_vit_167m_enc", "random", args={"depth": 1}), 3)


@pytest.fixture
def weights(tmp_path):
    """What a `test_vit` of 1,000 classes would be saved as; its default pooling is by a class token."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_that_the_file_lacks_are_named(weights):
    model = build_vit(ModelConfig("test_vit", str(weights)), 3)  # the head alone is new
    kept = load_file(weights)
    assert torch.equal(model.blocks[2].attn.qkv.weight, kept.pop("blocks.2.attn.qkv.weight"))
    save_file(kept, weights)
    for settings in ({}, {"pool": "avg", "args": {"dynamic_img_size": True}}):  # which don't ask for it
        with pytest.raises(ModelError, match=r"weights.safetensors lacks blocks\.2\.attn\.qkv\.weight: it is incom"):
            build_vit(ModelConfig("test_vit", str(weights), **settings), 3)


def test_weights_that_could_run_code_are_refused_unopened(tmp_path):
    for name in ("weights.bin", "weights.pth", "weights"):
        (tmp_path / name).write_bytes(b"no pickle either")
        with pytest.raises(ModelError, match=r"only \.safetensors is read, since .* can run code; convert it once"):
            build_vit(ModelConfig("test_vit", str(tmp_path / name)), 3)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_file_of_weights_that_is_none_or_broken_is_named(weights, tmp_path, kept):
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "model", safe_serialization=True)
    for file in (weights, tmp_path / "model" / "model.safetensors"):
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"^model\.weights=/.*/weights\.safetensors can't be read as safetensors: Err"):
        build_vit(ModelConfig("test_vit", str(weights)), 3)
    with pytest.raises(ModelError, match=r"^the weights of local-dir:/.*/model can't be read as safetensors: Error"):
        build_vit(ModelConfig(f"local-dir:{tmp_path / 'model'}"), 3)


def test_hash_of_a_folders_weights_is_that_of_its_file(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
    wanted = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    folder = ModelConfig(f"local-dir:{tmp_path}")
    assert weights_hash(folder) == weights_hash(ModelConfig("test_vit", str(tmp_path / "model.safetensors"))) == wanted
    assert weights_hash(replace(folder, weights="random")) is None


def test_weights_that_the_settings_ask_for_besides_are_told(weights):
    with pytest.warns(UserWarning, match=r"lacks fc_norm\.weight, fc_norm\.bias, .*; left out of it: norm\.b"):
        build_vit(ModelConfig("test_vit", str(weights), pool="avg"), 3)
    whole = ModelConfig("test_vit", str(weights), pool="avg", args={"fc_norm": False})  # pools what the norm made
    assert torch.equal(build_vit(whole, 3).norm.weight, load_file(weights)["norm.weight"])


def test_a_norm_beside_the_classifier_may_be_lacking(tmp_path):
    """Models pretrained without a classifier, as ConvNeXt V2 by FCMAE, have none."""
    kept = {key: t for key, t in timm.create_model("test_convnext").state_dict().items() if not key.startswith("head.")}
    save_file(kept, tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match=r"lacks head\.norm\.weight, head\.norm\.bias, which start untrained"):
        model = build_vit(ModelConfig("test_convnext", str(tmp_path / "weights.safetensors")), 3)
    assert torch.equal(model.stages[1].blocks[0].norm.weight, kept["stages.1.blocks.0.norm.weight"])


def test_what_a_smaller_model_leaves_out_of_a_file_is_told(weights):
    with pytest.warns(UserWarning, match=r"weights\.safetensors fits; left out of it: blocks\.5\."):
        build_vit(ModelConfig("test_vit", str(weights), args={"depth": 5}), 3)


def test_weights_of_an_architecture_with_more_in_its_blocks_are_refused(weights):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", init_values=0.1).state_dict(), weights)
    message = (
        r"weights\.safetensors has blocks\.0\.ls1\.gamma, .*, which test_vit lacks: .* choose the model\.name that"
    )
    with pytest.raises(ModelError, match=message):
        build_vit(ModelConfig("test_vit", str(weights)), 3)
    build_vit(ModelConfig("test_vit", str(weights), args={"init_values": 0.1}), 3)
    save_file(timm.create_model("test_vit").state_dict() | {"blocks.0.attn.attn_mask": torch.ones(2)}, weights)
    with pytest.warns(UserWarning, match=r"fits; left out of it: blocks\.0\.attn\.attn_mask"):  # a model works it out
        build_vit(ModelConfig("test_vit", str(weights)), 3)


def test_weights_in_the_home_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(EMBEDDED, tmp_path / "birds")
    expected = build_vit(ModelConfig("embedded"), 2).state_dict()
    for config in (ModelConfig("local-dir:~/birds"), ModelConfig("embedded", "~/birds/model.safetensors")):
        found = build_vit(config, 2).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith("head."))
        assert weights_hash(config) == weights_hash(ModelConfig("embedded"))
