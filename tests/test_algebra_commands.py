"""extract, resize and blend as a user runs them, on folders that the other commands open."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import peft
import pytest
import tiny_diffusion as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vislora.blend import blend
from vislora.compose import configure
from vislora.config.commands import BlendConfig, Blending, ExportConfig, ExtractConfig, ResizeConfig
from vislora.config.model import ModelConfig
from vislora.errors import AdapterError, ConfigError
from vislora.export import export
from vislora.extract import extract
from vislora.formats.diffusers import read_diffusers, write_diffusers
from vislora.formats.kohya import write_kohya
from vislora.formats.peft import read_peft, write_peft
from vislora.lora import Adapter, LowRankWeights
from vislora.models.vit import build_vit, save_vit, weights_hash
from vislora.recognizer import load_recognizer
from vislora.resize import resize

ARGS = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ModelConfig:
    """Base weights in a file, so that the base model can be built again."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    config = ModelConfig("vit_tiny_patch16_224", "random", 32, args=ARGS)
    save_file(build_vit(config, 0).state_dict(), path)
    config.weights = str(path)
    return config


def tuned_folder(base: ModelConfig, classes: list[str], folder: Path, seed: int) -> Path:
    """A model folder as full fine-tuning leaves it, with changes of rank 2 in every matrix of the blocks."""
    torch.manual_seed(seed)
    model = build_vit(base, len(classes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and p.dim() == 2:
                p.add_(0.1 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]))
    save(model, base, classes, folder)
    return folder


def save(model: nn.Module, base: ModelConfig, classes: list[str], folder: Path) -> None:
    images = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    about = {"model": asdict(base), "weights_sha256": weights_hash(base), "preprocessing": images, "data": {}}
    save_vit(model, folder, about | {"classes": classes})


@pytest.fixture(scope="module")
def birds(base, tmp_path_factory) -> tuple[Path, Path]:
    """A tuned model, and the adapter extracted from it."""
    root = tmp_path_factory.mktemp("birds")
    tuned = tuned_folder(base, ["wren", "tit", "robin"], root / "model", 2)
    extract(ExtractConfig(tuned=str(tuned), rank=2, out=str(root / "adapter")))
    return tuned, root / "adapter"


@pytest.fixture(scope="module")
def cats(base, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cats")
    tuned = tuned_folder(base, ["lynx", "puma"], root / "model", 3)
    extract(ExtractConfig(tuned=str(tuned), rank=2, out=str(root / "adapter")))
    return root / "adapter"


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_recognizer(folder).model(IMAGES)


def test_an_extracted_adapter_is_the_tuned_model_here_and_in_peft(birds, base):
    tuned, adapter = birds
    wanted = logits(tuned)
    torch.testing.assert_close(logits(adapter), wanted, rtol=1e-4, atol=1e-4)
    assert load_recognizer(adapter).classes == ("wren", "tit", "robin")
    theirs = peft.PeftModel.from_pretrained(build_vit(base, 3), adapter).eval()
    torch.testing.assert_close(theirs(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="is there already; choose another place"):
        extract(ExtractConfig(tuned=str(tuned), rank=2, out=str(adapter)))


def test_everything_may_be_in_the_home_folder(birds, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tuned, adapter = birds
    shutil.copytree(tuned, tmp_path / "model")
    shutil.copy(base.weights, tmp_path / "base.safetensors")
    extract(ExtractConfig(tuned="~/model", base="~/base.safetensors", rank=2, out="~/adapter"))
    resize(ResizeConfig(adapter="~/adapter", rank=2, out="~/resized"))
    export(ExportConfig(adapter="~/resized", weights="~/base.safetensors", out="~/merged"))
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.* lacks (attn_pool|reg_token)")
def test_what_the_base_weights_have_nothing_of_is_extracted_in_full_or_refused(base, tmp_path):
    for name, config in {
        "pool": replace(base, pool="map"),
        "token": replace(base, args=ARGS | {"no_embed_class": True, "reg_tokens": 2}),
    }.items():
        if name == "token":
            config.weights = str(tmp_path / "base.safetensors")
            fitting = replace(base, weights="random", args=ARGS | {"no_embed_class": True})
            save_file(build_vit(fitting, 0).state_dict(), config.weights)
        model = build_vit(config, 2)
        model.blocks[1].attn.qkv.weight.data.mul_(2)
        save(model, config, ["a", "b"], tmp_path / name)
    words = {"rank": 2, "ignore": ["*.bias"]}
    pool = extract(ExtractConfig(tuned=str(tmp_path / "pool"), **words, out=str(tmp_path / "x"))).adapter
    assert {*pool.trained} == {"head", "attn_pool"}
    assert {*pool.layers} == {"blocks.1.attn.qkv"}
    with pytest.raises(
        AdapterError, match="lack reg_token, which starts at random, and an adapter holds whole modules"
    ):
        extract(ExtractConfig(tuned=str(tmp_path / "token"), **words, out=str(tmp_path / "y")))


def test_grouped_convolutions_of_a_tuned_model_are_kept_in_full(tmp_path):
    base = ModelConfig("regnetx_002", "random", None)
    torch.manual_seed(1)
    save_file(build_vit(base, 0).state_dict(), tmp_path / "base.safetensors")
    base.weights = str(tmp_path / "base.safetensors")
    model = build_vit(base, 2)
    with torch.no_grad():
        model.s1.b1.conv2.conv.weight.mul_(1.1)  # in groups of 8 channels
        model.s1.b1.conv3.conv.weight.mul_(1.1)
    save(model, base, ["a", "b"], tmp_path / "model")
    done = extract(ExtractConfig(tuned=str(tmp_path / "model"), energy=1.0, out=str(tmp_path / "adapter")))
    assert done.adapter.layers.keys() == {"s1.b1.conv3.conv"}
    assert "s1.b1.conv2.conv" in done.adapter.trained
    torch.testing.assert_close(logits(tmp_path / "adapter"), logits(tmp_path / "model"), rtol=1e-4, atol=1e-4)


def test_model_that_has_one_module_in_several_places_is_saved_and_extracted(tmp_path):  # CoaT's MLPs
    base = ModelConfig("coat_lite_mini", "random", 32)
    torch.manual_seed(1)
    model = build_vit(base, 0)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    base.weights = str(tmp_path / "base.safetensors")
    model = build_vit(base, 2)
    with torch.no_grad():
        model.cpe1.proj.weight.mul_(1.1)
        model.serial_blocks1[0].factoratt_crpe.qkv.weight.mul_(1.1)
    save(model, base, ["a", "b"], tmp_path / "model")
    done = extract(ExtractConfig(tuned=str(tmp_path / "model"), energy=1.0, out=str(tmp_path / "adapter")))
    assert done.adapter.trained.keys() == {"head", "cpe1.proj"}
    torch.testing.assert_close(logits(tmp_path / "adapter"), logits(tmp_path / "model"), rtol=1e-4, atol=1e-4)


def test_the_command_extracts_from_two_files_and_prints_the_energy_of_each_layer(birds, base, tmp_path):
    tuned, _ = birds
    words = [f"base={base.weights}", f"tuned={tuned / 'model.safetensors'}", "energy=0.5", f"out={tmp_path / 'x'}"]
    command = [sys.executable, "-m", "vislora.extract", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "rank", "energy"]
    name, rank, energy = lines[1].split()
    layer = read_peft(tmp_path / "x").layers[name]
    assert (layer.rank, int(rank)) == (1, 1)  # of two singular values, the larger one is more than half
    difference = load_file(tuned / "model.safetensors")[f"{name}.weight"] - load_file(base.weights)[f"{name}.weight"]
    squares = torch.linalg.svdvals(difference).square()
    assert float(energy[:-1]) == pytest.approx(100 * float(squares[0] / squares.sum()), abs=0.06)
    assert lines[-2:] == ["kept in full: head", f"adapter: {tmp_path / 'x'}"]


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_an_adapter_of_a_pipelines_component_is_the_tuned_one_in_diffusers(component, tmp_path):
    pipe = tiny.stable_diffusion_xl(tmp_path / "words")
    model = getattr(pipe, component)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("to_v.weight", "v_proj.weight")):
                p.add_(torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]))
    model.save_pretrained(tmp_path / "tuned")
    wanted = tiny.draw(pipe)
    (base,), (tuned,) = ([*(tmp_path / which).glob("*.safetensors")] for which in ("base", "tuned"))
    words = [f"base={base}", f"tuned={tuned}", "rank=2", f"component={component}"]
    computed = extract(configure("extract", [*words, f"out={tmp_path / 'adapter.safetensors'}"]))
    assert {line.split()[0] for line in computed.table().splitlines()[1:]} == {*computed.adapter.layers}
    fresh = tiny.stable_diffusion_xl(tmp_path / "words")
    fresh.load_lora_weights(tmp_path / "adapter.safetensors")
    assert torch.allclose(tiny.draw(fresh), wanted, atol=1e-4)
    assert not torch.allclose(tiny.draw(tiny.stable_diffusion_xl(tmp_path / "words")), wanted, atol=1e-3)


def test_a_resized_adapter_keeps_classes_and_head_and_says_what_is_lost(birds, tmp_path):
    _, adapter = birds
    done = resize(ResizeConfig(adapter=str(adapter), rank=1, out=str(tmp_path / "small")))
    assert all(0.5 < energy < 0.999 for energy in done.energy.values())
    small, large = load_recognizer(tmp_path / "small"), load_recognizer(adapter)
    assert small.classes == large.classes
    assert torch.equal(small.model.head.weight, large.model.head.weight)
    assert {w.rank for w in read_peft(tmp_path / "small").layers.values()} == {1}
    assert not torch.allclose(logits(tmp_path / "small"), logits(adapter), atol=1e-3)
    resize(ResizeConfig(adapter=str(adapter), rank=5, out=str(tmp_path / "large")))
    torch.testing.assert_close(logits(tmp_path / "large"), logits(adapter), rtol=1e-4, atol=1e-4)


def test_the_command_blends_adapters_and_takes_the_head_that_is_named(birds, cats, tmp_path):
    _, adapter = birds
    command = [
        sys.executable,
        "-m",
        "vislora.blend",
        f"adapter=[{adapter},{cats}]",
        f"out={tmp_path / 'both'}",
        "how=cat",
    ]
    refused = subprocess.run([*command, "weights=[1,0.5]"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert "different fully trained modules (head)" in refused.stderr
    done = subprocess.run([*command, "weights=[1,0]", "head=0"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(logits(tmp_path / "both"), logits(adapter), rtol=1e-4, atol=1e-4)
    blend(BlendConfig(adapter=[str(adapter), str(cats)], weights=[0.5, 0.5], head=1, out=str(tmp_path / "half")))
    assert load_recognizer(tmp_path / "half").classes == ("lynx", "puma")


def test_adapters_of_pipelines_stay_in_files_that_diffusers_opens(tmp_path):
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = [LowRankWeights(torch.randn(3, 8), torch.randn(8, 3), 3, 3.0, 8) for _ in range(2)]
    write_kohya(Adapter({unet: weights[0]}), tmp_path / "one.safetensors")
    write_diffusers(Adapter({unet: weights[1]}), tmp_path / "two")
    both = BlendConfig(
        adapter=[str(tmp_path / "one.safetensors"), str(tmp_path / "two")],
        weights=[0.5, 2.0],
        how=Blending.cat,
        out=str(tmp_path / "both"),
    )
    with pytest.raises(ConfigError, match="head=1: adapters of pipelines have no heads"):
        blend(replace(both, head=1))
    write_diffusers(Adapter({"transformer.blocks.0.attn1.to_q": weights[0]}), tmp_path / "other")
    with pytest.raises(AdapterError, match=r"two is for a pipeline with a UNet, .*other for one with a transformer"):
        blend(replace(both, adapter=[str(tmp_path / "two"), str(tmp_path / "other")]))
    blend(both)
    resize(ResizeConfig(adapter=str(tmp_path / "both"), rank=6, out=str(tmp_path / "small.safetensors")))
    wanted = 0.5 * weights[0].lora_B @ weights[0].lora_A + 2 * weights[1].lora_B @ weights[1].lora_A
    for path in (tmp_path / "both" / "pytorch_lora_weights.safetensors", tmp_path / "small.safetensors"):
        (found,) = read_diffusers(path).layers.values()
        torch.testing.assert_close(found.scale * found.lora_B @ found.lora_A, wanted, rtol=1e-4, atol=1e-4)


def test_a_unet_and_a_text_encoder_blended_are_a_pipelines_adapter(tmp_path):
    low = LowRankWeights(torch.randn(2, 8), torch.randn(8, 2), 2, 2.0, 8)
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "encoder.layers.0.self_attn.q_proj"]
    for name in names:
        write_peft(Adapter({name: low}), tmp_path / name.partition(".")[0])
    folders = [str(tmp_path / "down_blocks"), str(tmp_path / "encoder")]
    blend(BlendConfig(adapter=folders, weights=[1.0, 1.0], how=Blending.cat, out=str(tmp_path / "both")))
    layers = read_diffusers(tmp_path / "both").layers
    assert {*layers} == {f"unet.{names[0]}", f"text_encoder.text_model.{names[1]}"}


def test_a_checkpoint_in_stabilitys_names_is_refused_at_once(tmp_path):
    key = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    for name in ("base", "tuned"):
        save_file({key: torch.randn(8, 8)}, tmp_path / f"{name}.safetensors")
    words = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")}
    with pytest.raises(ConfigError, match=r"is a whole checkpoint, with model\.diffusion_model.* save it and the base"):
        extract(ExtractConfig(**words, rank=2, out=str(tmp_path / "out")))
    with pytest.raises(AdapterError, match="a whole checkpoint can't be read"):
        read_diffusers(tmp_path / "tuned.safetensors")


def test_what_recognises_and_what_draws_are_not_blended(birds, tmp_path):
    _, adapter = birds
    low = LowRankWeights(torch.randn(2, 8), torch.randn(8, 2), 2, 2.0, 8)
    style = write_diffusers(Adapter({"unet.mid_block.attn.to_q": low}), tmp_path / "style")
    write_peft(Adapter({"mid_block.attn.to_q": low}), tmp_path / "unet")
    for other in (style, tmp_path / "unet"):
        message = f"{adapter} recognises and {other} draws; only adapters of one model can be blended"
        with pytest.raises(AdapterError, match=message):
            blend(BlendConfig(adapter=[str(other), str(adapter)], weights=[1, 1], out=str(tmp_path / "both")))
    for name in "ab":  # a recogniser's layers may be called as a UNet's are
        write_peft(Adapter({"conv_in": low}, about={"classes": ["x", "y"]}), tmp_path / name)
    both = [str(tmp_path / name) for name in "ab"]
    blend(BlendConfig(adapter=both, weights=[1, 1], how=Blending.cat, out=str(tmp_path / "both")))


def test_adapters_of_different_base_models_are_not_blended(birds, cats, tmp_path):
    _, adapter = birds
    other = tmp_path / "other"
    resize(ResizeConfig(adapter=str(cats), rank=2, out=str(other)))
    about = json.loads((other / "vislora.json").read_text())
    (other / "vislora.json").write_text(json.dumps(about | {"weights_sha256": "0" * 64}))
    message = "other was trained on vit_tiny_patch16_224 with weights of SHA-256 00.*; only one base can be blended"
    with pytest.raises(AdapterError, match=message):
        blend(BlendConfig(adapter=[str(adapter), str(other)], weights=[1, 1], out=str(tmp_path / "both")))


def test_styles_of_bases_of_two_names_are_blended_with_a_word_and_remember_both_trainings(tmp_path, capsys):
    layer = LowRankWeights(torch.randn(3, 8), torch.randn(8, 3), 3, 3.0, 8)
    files = []
    for name in ("one", "other"):
        about = {"model": {"name": name}, "data": {"kind": "captions", "root": f"/{name}"}}
        adapter = Adapter({"unet.mid_block.attn.to_q": layer}, about=about)
        files.append(str(write_diffusers(adapter, tmp_path / f"{name}.safetensors")))
    out = tmp_path / "both.safetensors"
    blend(BlendConfig(adapter=files, weights=[0.7, 0.3], how=Blending.cat, out=str(out)))
    assert f"{files[1]} was trained on other, {files[0]} on one; blended as" in capsys.readouterr().out
    assert [one["data"]["root"] for one in read_diffusers(out).about["trainings"]] == ["/one", "/other"]
    theirs = write_diffusers(Adapter({"unet.mid_block.attn.to_q": layer}), tmp_path / "theirs.safetensors")
    config = BlendConfig(adapter=[files[0], str(theirs)], weights=[0.1, 0.9], out=str(tmp_path / "more.safetensors"))
    blend(config)
    assert read_diffusers(Path(config.out)).about["trainings"] == [{"data": about["data"] | {"root": "/one"}}, {}]


def test_an_adapter_that_tells_no_base_is_blended_with_one_that_does(tmp_path):
    layer = LowRankWeights(torch.randn(3, 8), torch.randn(8, 3), 3, 3.0, 8)
    weights = {"unet.mid_block.attn.to_q": layer}
    mine, downloaded = tmp_path / "mine.safetensors", tmp_path / "downloaded.safetensors"
    write_diffusers(Adapter(weights, about={"model": {"name": "embedded"}}), mine)
    write_diffusers(Adapter(weights), downloaded)
    for i, files in enumerate(([mine, downloaded], [downloaded, mine])):
        out = tmp_path / f"{i}.safetensors"
        blend(BlendConfig(adapter=[*map(str, files)], weights=[0.7, 0.3], how=Blending.cat, out=str(out)))
        both = read_diffusers(out)
        (found,) = both.layers.values()
        torch.testing.assert_close(found.scale * found.lora_B @ found.lora_A, layer.lora_B @ layer.lora_A)
        assert both.about == {"model": {"name": "embedded"}}


def test_mistakes_are_explained(birds, tmp_path):
    tuned, adapter = birds
    out = str(tmp_path / "out")
    for config in (ExtractConfig, ResizeConfig):
        with pytest.raises(ConfigError, match=r"give a rank=8, or the share of each update"):
            config()
    with pytest.raises(ConfigError, match=r"give them with base=FILE"):
        extract(ExtractConfig(tuned=str(tuned / "model.safetensors"), rank=2, out=out))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    with pytest.raises(ConfigError, match=r"pipeline is a whole pipeline; give a file of one of its models"):
        extract(ExtractConfig(tuned=str(tmp_path / "pipeline"), rank=2, out=out))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"unet is a model's folder without vislora\.json, .* give the \.safetensors file"
    ):
        extract(ExtractConfig(tuned=str(tmp_path / "unet"), rank=2, out=out))
    unet = str(tmp_path / "unet.safetensors")
    save_file({"down_blocks.0.attentions.0.to_q.weight": torch.ones(8, 8)}, unet)
    for words, message in (
        ({"component": "text_encoder"}, r"component=text_encoder: tuned=.* has the layers of unet"),
        ({"component": "text_encoder_3"}, r"component=text_encoder_3: tuned=.* has the layers of unet"),
        ({"component": "vae"}, r"component=vae: expected one of unet, transformer, "),
        ({"component": "unet", "tuned": str(tuned)}, r"component=unet is a pipeline's, and .* holds a classifier"),
    ):
        with pytest.raises(ConfigError, match=message):
            extract(ExtractConfig(**{"base": unet, "tuned": unet, "rank": 2, "out": out} | words))
    with pytest.raises(
        ConfigError, match=r"out=x\.safetensors: a single model's adapter is a folder, .* component=unet"
    ):
        ExtractConfig(rank=2, out="x.safetensors")
    with pytest.raises(ConfigError, match=r"can't be read as a \.safetensors file"):
        extract(ExtractConfig(tuned=__file__, base=__file__, rank=2, out=out))
    with pytest.raises(ConfigError, match=r"this command takes several adapters, adapter=\[FOLDER,FOLDER\]"):
        configure("blend", [f"adapter={adapter}", "weights=[1]", f"out={out}"])
    with pytest.raises(ConfigError, match=r"weights=\[0\.0, 0\.0\] leave nothing of the adapters"):
        configure("blend", [f"adapter=[{adapter},{adapter}]", "weights=[0,0]", f"out={out}"])
    with pytest.raises(ConfigError, match="weights=nan: expected a finite number"):
        configure("blend", [f"adapter=[{adapter},{adapter}]", "weights=[nan,1]", f"out={out}"])
    with pytest.raises(ConfigError, match="this command takes one adapter's folder"):
        configure("resize", [f"adapter=[{adapter},{adapter}]", "rank=2", f"out={out}"])
