"""read_adapter knows each format by its content; write_adapter writes each, and PEFT opens its folders."""

import copy
from dataclasses import replace

import pytest
import tiny_diffusion as tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vislora.errors import AdapterError
from vislora.files import write_tensors
from vislora.formats.components import COMPONENTS, named_by_component, of_models, with_component
from vislora.formats.detect import is_of_a_pipeline, read_adapter, write_adapter
from vislora.formats.peft import TENSORS, write_peft
from vislora.lora import Adapter, LowRankWeights
from vislora.recognizer import read_about


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipe"))


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_every_format_is_known_by_content_and_keeps_the_function(pipe, tmp_path, to):
    adapter = tiny.trained(pipe)
    written = write_adapter(adapter, to, tmp_path / "adapter")
    moved = written.rename(tmp_path / f"any_name{written.suffix}")
    back = {tiny.in_files(name): w for name, w in read_adapter(moved).layers.items()}
    assert back.keys() == {tiny.in_files(name) for name in adapter.layers}
    for name, weights in adapter.layers.items():
        assert torch.allclose(tiny.delta(back[tiny.in_files(name)]), tiny.delta(weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_file_that_holds_something_else_than_was_written_is_an_error(pipe, tmp_path, monkeypatch, to):
    def damaged(tensors, *rest):
        key = next(key for key in tensors if "lora_B" in key or "lora_up" in key)
        write_tensors(tensors | {key: 1.001 * tensors[key]}, *rest)

    def cut_off(tensors, *rest):
        layer = next(iter(tensors)).partition(".lora_")[0]
        write_tensors({key: tensor for key, tensor in tensors.items() if not key.startswith(f"{layer}.")}, *rest)

    for disk in (damaged, cut_off):
        monkeypatch.setattr(f"vislora.formats.{to}.write_tensors", disk)
        with pytest.raises(AdapterError, match="reads back"):
            write_adapter(tiny.trained(pipe), to, tmp_path / disk.__name__)
        assert not [*tmp_path.glob(f"{disk.__name__}/**/*.safetensors")]


@pytest.mark.parametrize("build", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.flux])
def test_each_component_gets_the_names_of_its_model(build, tmp_path):
    pipe = build(tmp_path)
    adapter = tiny.trained(pipe, lambda name: name.endswith(("q_proj", "to_q")), components=COMPONENTS)
    parts = of_models(named_by_component(adapter))
    assert len(parts) > 1
    for component, part in parts.items():
        assert part.layers.keys() <= dict(getattr(pipe, component).named_modules()).keys()
    assert sum(len(part.layers) for part in parts.values()) == len(adapter.layers)


def test_what_is_trained_in_full_comes_back_from_the_folder_of_its_component(pipe, tmp_path):
    norm = {"weight": torch.rand(8), "bias": torch.rand(8)}
    biases = {"unet.conv_in.bias": torch.rand(8)}
    adapter = replace(tiny.trained(pipe), trained={"unet.conv_norm_out": norm}, biases=biases)
    back = read_adapter(write_adapter(adapter, "peft", tmp_path))
    assert replace(back, layers={}).equals(replace(adapter, layers={}))


def test_peft_opens_the_folder_of_each_component(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    write_adapter(tiny.trained(pipe), "peft", tmp_path)
    noise, steps, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, tiny.WIDTH)
    with torch.no_grad():
        plain = pipe.unet(noise, steps, text).sample
        opened = peft.PeftModel.from_pretrained(tiny.unet(), str(tmp_path / "unet"))(noise, steps, text).sample
        weights = tiny.unet()
        for name, low in tiny.trained(pipe, components=["unet"]).layers.items():
            layer = weights.get_submodule(name.removeprefix("unet."))
            layer.weight += tiny.delta(low).view(layer.weight.shape)
        assert (opened - plain).abs().max() > 1e-3
        assert torch.allclose(opened, weights(noise, steps, text).sample, atol=1e-5)


def test_peft_opens_the_folders_of_text_encoders(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = tiny.trained(pipe, components=["text_encoder"])
    write_adapter(read_adapter(write_adapter(adapter, "diffusers", tmp_path / "file")), "peft", tmp_path / "folder")
    ids = torch.arange(6)[None]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pipe.text_encoder), str(tmp_path / "folder" / "text_encoder"))
    with torch.no_grad():
        found = theirs(ids).last_hidden_state
        wanted = copy.deepcopy(pipe.text_encoder)
        for name, low in adapter.layers.items():
            wanted.get_submodule(name.removeprefix("text_encoder.")).weight += tiny.delta(low)
        torch.testing.assert_close(found, wanted(ids).last_hidden_state)
        assert not torch.allclose(found, pipe.text_encoder(ids).last_hidden_state, atol=1e-3)


def test_folder_goes_by_what_its_file_holds_and_not_by_the_files_name(pipe, tmp_path):
    write_adapter(tiny.trained(pipe), "kohya", tmp_path / "pytorch_lora_weights.safetensors")
    assert (
        read_adapter(tmp_path).layers.keys()
        == read_adapter(tmp_path / "pytorch_lora_weights.safetensors").layers.keys()
    )


def test_one_layer_under_two_names_is_refused():
    low = LowRankWeights(torch.ones(2, 4), torch.ones(4, 2), 2, 3.0, 4)
    names = ("encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj")
    twice = Adapter({f"text_encoder.{name}": replace(low) for name in names})
    with pytest.raises(AdapterError, match=r"text_encoder\.text_model.*q_proj by two names; which one counts"):
        named_by_component(twice)


@pytest.mark.parametrize(
    ("bare", "named"),
    [
        ("conv_in", "unet.conv_in"),
        ("time_embedding.linear_1", "unet.time_embedding.linear_1"),
        ("x_embedder", "transformer.x_embedder"),
        ("encoder.layers.3.mlp.fc1", "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
    ],
)
def test_layers_without_a_component_get_the_only_one_they_can_belong_to(bare, named):
    assert with_component(bare) == named


def test_layers_that_tell_no_component_belong_to_that_of_the_others():
    low = LowRankWeights(torch.ones(2, 4), torch.ones(4, 2), 2, 3.0, 4)
    names = ["transformer_blocks.0.attn.to_q", "norm_out.linear"]
    found = named_by_component(Adapter(dict.fromkeys(names, low), biases={"proj_out.bias": torch.ones(4)}))
    assert [*found.layers, *found.biases] == [f"transformer.{name}" for name in [*names, "proj_out.bias"]]
    with pytest.raises(AdapterError, match=r"norm_out\.linear names no component"):
        named_by_component(Adapter(dict.fromkeys([*names, "down_blocks.0.resnets.0.conv1"], low)))


def test_a_classifiers_encoder_is_no_text_encoder():  # torchvision's ViT
    with pytest.raises(AdapterError, match="names no component"):
        with_component("encoder.layers.encoder_layer_0.mlp.0")


def test_components_in_pefts_folders_are_in_the_models_own_names(tmp_path):
    low = LowRankWeights(torch.ones(2, 4), torch.ones(4, 2), 2, 3.0, 4)
    layers = {f"{name}.text_model.encoder.layers.0.mlp.fc1": low for name in ("text_encoder", "text_encoder_2")}
    layers["unet.conv_in"] = low
    trained = {"text_encoder.text_model.final_layer_norm": {"weight": torch.ones(4)}}
    write_adapter(Adapter(layers, trained), "peft", tmp_path)
    kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    for component, kind in kinds.items():
        level = "text_model." if hasattr(tiny.clip(kind), "text_model") else ""
        keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / component / TENSORS)}
        mlp, norm = f"{level}encoder.layers.0.mlp.fc1", f"{level}final_layer_norm.weight"
        own = {norm} if component == "text_encoder" else set()
        assert keys == {f"{mlp}.lora_A.weight", f"{mlp}.lora_B.weight"} | own


def test_the_largest_dropout_of_the_components_counts(tmp_path):
    low = LowRankWeights(torch.ones(2, 4), torch.ones(4, 2), 2, 3.0, 4)
    for component, dropout in (("text_encoder", 0.0), ("unet", 0.3)):
        write_peft(Adapter({"down_blocks": low}, dropout=dropout), tmp_path / component)
    assert read_adapter(tmp_path).dropout == 0.3


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("bad", [torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_matrices_that_arent_numbers_are_named(pipe, tmp_path, to, bad):
    written = write_adapter(tiny.trained(pipe, components=["unet"]), to, tmp_path / "adapter")
    file = written if written.suffix else written / "unet" / TENSORS if to == "peft" else next(written.glob("*"))
    file = file if file.is_file() else next(file.rglob("*.safetensors"))
    tensors = load_file(file)
    name = next(key for key in tensors if tensors[key].dim() == 2)
    tensors[name][0, 0] = bad
    with safe_open(file, "pt") as old:
        save_file(tensors, file, old.metadata())
    with pytest.raises(AdapterError, match=r"has a lora_[AB] of torch\.float32 that isn't all of finite numbers"):
        read_adapter(written)


def test_pefts_folder_doesnt_get_the_name_of_a_file(pipe, tmp_path):
    layer = LowRankWeights(torch.ones(2, 4), torch.ones(6, 2), 2, 3.0, 6)
    for adapter in (tiny.trained(pipe), Adapter({"blocks.0.qkv": layer})):
        with pytest.raises(
            AdapterError, match=r"a\.safetensors has the name of a file; PEFT's format is a folder, .*/a$"
        ):
            write_adapter(adapter, "peft", tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_pipelines_part_is_no_recogniser(pipe, tmp_path):
    write_adapter(tiny.trained(pipe, components=["unet"]), "peft", tmp_path)
    with pytest.raises(AdapterError, match=r"unet/vislora\.json has no 'model', as a recogniser's has; part of a pipe"):
        read_about(tmp_path / "unet")


@pytest.mark.parametrize("name", ["", TENSORS])
def test_a_unets_folder_draws_and_a_classifiers_recognises(pipe, tmp_path, name):
    layer = LowRankWeights(torch.ones(2, 4), torch.ones(6, 2), 2, 3.0, 6)
    write_adapter(tiny.trained(pipe, components=["unet"]), "peft", tmp_path)
    write_adapter(Adapter({"blocks.0.attn.qkv": layer}), "peft", tmp_path / "vit")
    assert is_of_a_pipeline(tmp_path / "unet" / name)
    assert not is_of_a_pipeline(tmp_path / "vit" / name)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_fused_projections_are_written_as_the_layers_that_they_stack(pipe, tmp_path, to):
    adapter = tiny.trained(pipe, components=["unet"])
    name = next(name for name in adapter.layers if name.endswith("attn1.to_q"))
    parent, q = name.removesuffix("to_q"), adapter.layers[name]
    rows = ((0, q.out), (2 * q.out, 3 * q.out))
    a, b = torch.randn(4, q.lora_A.shape[1]), torch.randn(2 * q.out, 2)
    write_adapter(Adapter({f"{parent}to_qkv": LowRankWeights(a, b, 2, 3.0, 3 * q.out, rows=rows)}), to, tmp_path / "a")
    read = named_by_component(read_adapter(tmp_path / "a")).layers
    assert read.keys() == {f"{parent}to_q", f"{parent}to_v"}
    for i, letter in enumerate("qv"):
        wanted = 3.0 / 2 * b[i * q.out : (i + 1) * q.out] @ a[2 * i : 2 * i + 2]
        assert torch.allclose(tiny.delta(read[f"{parent}to_{letter}"]), wanted, atol=1e-5)


@pytest.mark.parametrize(("rows", "out"), [(((0, 16),), 24), (((20, 24),), 24), (None, 32), (None, 4), (None, 2)])
def test_fused_projections_of_unequal_heights_are_refused(tmp_path, rows, out):
    b = torch.randn(sum(stop - start for start, stop in rows) if rows else out, 2)
    stacked = LowRankWeights(torch.randn(2, 16), b, 2, 2.0, out, rows=rows)
    with pytest.raises(AdapterError, match=r"to_qkv stacks layers of unequal heights"):
        write_adapter(Adapter({"unet.mid_block.attn1.to_qkv": stacked}), "diffusers", tmp_path / "a")


def test_folder_with_one_file_of_any_format_is_read(pipe, tmp_path):
    write_adapter(tiny.trained(pipe), "kohya", tmp_path / "style")
    assert read_adapter(tmp_path / "style").layers
    write_adapter(tiny.trained(pipe), "diffusers", tmp_path / "other")
    assert read_adapter(str(tmp_path / "other")).layers


def test_tensors_of_a_peft_folder_are_read_with_the_settings_beside_them(tmp_path):
    adapter = Adapter({"blocks.0.qkv": LowRankWeights(torch.ones(2, 4), torch.ones(6, 2), 2, 3.0, 6)})
    write_peft(adapter, tmp_path)
    assert read_adapter(tmp_path / TENSORS).equals(adapter)
    (tmp_path / TENSORS).rename(tmp_path / "alone.safetensors")
    with pytest.raises(AdapterError, match=r"is part of a PEFT folder, and adapter_config.json isn't beside it"):
        read_adapter(tmp_path / "alone.safetensors")


def test_nothing_is_written_of_an_adapter_that_peft_cant_hold_in_whole(pipe, tmp_path):
    mixed = tiny.trained(pipe).layers | tiny.trained(pipe, lambda name: name.endswith("fc1"), dora=True).layers
    with pytest.raises(AdapterError, match="with and without DoRA"):
        write_adapter(Adapter(mixed), "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_peft_folders_of_two_adapters_are_not_mixed(pipe, tmp_path):
    write_adapter(tiny.trained(pipe), "peft", tmp_path)
    with pytest.raises(AdapterError, match="holds text_encoder of another adapter; choose another folder"):
        write_adapter(tiny.trained(pipe, components=["unet"]), "peft", tmp_path)


def test_folder_of_several_adapters_of_a_model_is_no_pipelines(tmp_path):
    adapter = Adapter({"blocks.0.qkv": LowRankWeights(torch.ones(2, 4), torch.ones(6, 2), 2, 3.0, 6)})
    for name in ("checkpoint-10", "checkpoint-5"):
        write_peft(adapter, tmp_path / name)
    with pytest.raises(AdapterError, match=r"no component of a pipeline \(checkpoint-10, checkpoint-5\); give one"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path / "checkpoint-5").equals(adapter)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.pth"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(AdapterError, match="is a pickle, which can run any code when it is opened"):
        read_adapter(tmp_path / name)


def test_what_is_no_adapter_is_told(tmp_path):
    with pytest.raises(AdapterError, match=r"isn't there; an adapter is a .safetensors file, or a folder"):
        read_adapter(tmp_path / "nothing.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    for read in (read_adapter, read_about):
        with pytest.raises(AdapterError, match=r"exported nothing yet; trainer\.resume=.*run trainer\.stop_at=1"):
            read(run)
    for part, told in (("model", "give .*run/model$"), ("adapter", "give .*run/adapter or .*run/model$")):
        (run / part).mkdir()
        for read in (read_adapter, read_about):
            with pytest.raises(AdapterError, match=f"run is a run's folder; {told}"):
                read(run)
    with pytest.raises(AdapterError, match="holds none of the files of an adapter"):
        read_adapter(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / "model" / name).touch()
    with pytest.raises(AdapterError, match=r"model is a whole model; python -m vislora\.extract tuned=.*/model r"):
        read_adapter(tmp_path / "run" / "model")
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=r"holds 2 .safetensors files; name one"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"a.safetensors: 'x': its meaning isn't known"):
        read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterError, match=r"broken.safetensors can't be read as safetensors"):
        read_adapter(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_scales_that_are_folded_into_matrices_of_half_precision_are_not_rounded(pipe, tmp_path, to):
    adapter = tiny.trained(pipe, alpha=lambda name: 5.0 + len(name) % 2)
    halved = {n: replace(w, lora_A=w.lora_A.half(), lora_B=w.lora_B.half()) for n, w in adapter.layers.items()}
    written = write_adapter(Adapter(halved), to, tmp_path / "it.safetensors")
    back = {tiny.in_files(name): w for name, w in read_adapter(written).layers.items()}
    for name, w in halved.items():
        whole = replace(w, lora_A=w.lora_A.float(), lora_B=w.lora_B.float())
        torch.testing.assert_close(tiny.delta(back[tiny.in_files(name)]), tiny.delta(whole))
