"""diffusers' file keeps the function of an adapter; diffusers' own files are read; what would be lost is refused."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vislora
from vislora.errors import AdapterError
from vislora.formats.diffusers import FILE, read_diffusers, write_diffusers
from vislora.lora import Adapter, LowRankWeights

peft = pytest.importorskip("peft")

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    return tiny.stable_diffusion(tmp_path_factory.mktemp("pipe"))


def named_as_in_files(adapter: Adapter) -> dict[str, LowRankWeights]:
    return {tiny.in_files(name): w for name, w in adapter.layers.items()}


def same_function(one: Adapter, other: Adapter) -> None:
    mine, theirs = named_as_in_files(one), named_as_in_files(other)
    assert mine.keys() == theirs.keys()
    for name, weights in mine.items():
        assert torch.allclose(tiny.delta(weights), tiny.delta(theirs[name]), rtol=1e-5, atol=1e-7), name


# --- Written here -----------------------------------------------------------------------------------------------------


def test_file_reads_back_as_the_same_function(pipe, tmp_path):
    adapter = replace(tiny.trained(pipe), about={"model": {"name": "embedded"}})
    file = write_diffusers(adapter, tmp_path / "style.v2")
    assert file == tmp_path / "style.v2" / FILE
    back = read_diffusers(tmp_path / "style.v2")
    same_function(adapter, back)
    assert back.about == adapter.about


def test_mixed_ranks_scales_and_rslora_read_back_as_the_same_function(pipe, tmp_path):
    adapter = tiny.trained(
        pipe, lambda name: True, lambda name: 2 + len(name) % 3, lambda name: 1.0 + 0.37 * (len(name) % 5)
    )
    stabilised = {name: replace(w, rslora=name.endswith("to_v")) for name, w in adapter.layers.items()}
    same_function(Adapter(stabilised), read_diffusers(write_diffusers(Adapter(stabilised), tmp_path)))


def test_dora_reads_back_with_its_lengths(pipe, tmp_path):
    adapter = tiny.trained(pipe, lambda name: name.endswith(("to_q", "conv1", "q_proj")), dora=True)
    back = read_diffusers(write_diffusers(adapter, tmp_path))
    same_function(adapter, back)
    layers = named_as_in_files(adapter)
    assert all(torch.equal(back.layers[name].magnitude, weights.magnitude) for name, weights in layers.items())


def test_dora_beside_plain_layers_cannot_be_written(pipe, tmp_path):
    mixed = tiny.trained(pipe).layers | tiny.trained(pipe, lambda name: "conv1" in name, dora=True).layers
    with pytest.raises(AdapterError, match="can't hold layers with and without DoRA in one unet"):
        write_diffusers(Adapter(mixed), tmp_path)


def test_every_reader_gets_the_same_scale_with_and_without_the_header(pipe, tmp_path):
    adapter = tiny.trained(pipe, rank=lambda name: 4 if name.endswith("to_v") else 2, alpha=lambda name: 5.0)
    file = write_diffusers(adapter, tmp_path)
    save_file(load_file(file), tmp_path / "bare.safetensors")
    same_function(adapter, read_diffusers(tmp_path / "bare.safetensors"))
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"]
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"] != {}


def test_what_dropped_out_in_training_no_longer_does_in_diffusers(pipe, tmp_path):
    adapter = tiny.trained(pipe)
    peers = [tiny.stable_diffusion(tmp_path / "words") for _ in range(2)]
    for peer, dropout in zip(peers, (0.0, 0.9), strict=True):
        peer.load_lora_weights(str(write_diffusers(replace(adapter, dropout=dropout), tmp_path / f"{dropout}")))
    assert torch.equal(*map(tiny.draw, peers))


def test_keys_are_those_that_diffusers_documents(pipe, tmp_path):
    keys = list(load_file(write_diffusers(tiny.trained(pipe), tmp_path)))
    assert f"{UNET}.lora_A.weight" in keys
    assert f"{TEXT}.lora_linear_layer.down.weight" in keys
    assert all("lora" in key for key in keys)


def test_pairs_on_fused_projections_are_written_as_the_layers_that_were_fused(tmp_path):
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    a, b = torch.randn(4, 6), torch.randn(8, 2)  # pairs for q and v, rank 2, of a to_qkv with 12 rows
    rows = LowRankWeights(a, b, 2, 3.0, 12, rows=((0, 4), (8, 12)))
    whole = LowRankWeights(a, torch.randn(12, 4), 4, 3.0, 12)
    text = LowRankWeights(a, torch.randn(8, 4), 4, 4.0, 8)
    adapter = Adapter({f"{attention}.to_qkv": rows, f"{attention[:-1]}2.to_kv": text, "unet.x.attn1.to_qkv": whole})
    layers = read_diffusers(write_diffusers(adapter, tmp_path)).layers
    expected = {
        f"{attention}.to_q": 1.5 * b[:4] @ a[:2],
        f"{attention}.to_v": 1.5 * b[4:] @ a[2:],
        f"{attention[:-1]}2.to_k": text.lora_B[:4] @ a,
        f"{attention[:-1]}2.to_v": text.lora_B[4:] @ a,
        **{f"unet.x.attn1.to_{x}": 0.75 * whole.lora_B[4 * i : 4 * i + 4] @ a for i, x in enumerate("qkv")},
    }
    assert layers.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.allclose(tiny.delta(layers[name]), wanted, atol=1e-6)


def test_magnitudes_of_fused_projections_go_with_their_rows(tmp_path):
    pytest.importorskip("safetensors", "0.6")  # 0.5 reads onto the default device
    attention, lengths = "unet.mid_block.attentions.0.transformer_blocks.0.attn1", torch.rand(12)
    q = LowRankWeights(torch.randn(2, 6), torch.randn(4, 2), 2, 3.0, 12, rows=((0, 4),), magnitude=lengths)
    with torch.device("meta"):  # as where a GPU is the default device
        layers = read_diffusers(write_diffusers(Adapter({f"{attention}.to_qkv": q}), tmp_path)).layers
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(layers[f"{attention}.{part}"].magnitude, lengths[4 * i : 4 * i + 4])


def test_adapter_of_a_bare_unet_is_written_as_the_pipelines(pipe, tmp_path):
    adapter = tiny.trained(pipe, components=["unet"])
    bare = Adapter({name.removeprefix("unet."): w for name, w in adapter.layers.items()})
    same_function(adapter, read_diffusers(write_diffusers(bare, tmp_path)))


def test_rank_of_a_layer_whose_name_ends_anothers_is_its_own(tmp_path):
    def layer(rank: int) -> LowRankWeights:
        return LowRankWeights(torch.randn(rank, 8), torch.randn(8, rank), rank, 2.0 * rank, 8)

    adapter = Adapter({"unet.c.conv_in": layer(3), "unet.z.c.conv_in": layer(2), "unet.conv_in": layer(2)})
    file = write_diffusers(adapter, tmp_path)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(**{k.removeprefix("unet."): v for k, v in header.items() if k != "unet.peft_type"})
    for name, weights in adapter.layers.items():
        key = peft.utils.other.get_pattern_key(config.rank_pattern.keys(), name.removeprefix("unet."))
        assert config.rank_pattern.get(key, config.r) == weights.rank
    same_function(adapter, read_diffusers(file))


def test_untrained_fused_projections_are_refused(tmp_path):
    low = LowRankWeights(torch.randn(4, 8), torch.zeros(24, 4), 4, 8.0, 24)
    with pytest.raises(AdapterError, match="the adapter is untrained"):
        write_diffusers(Adapter({UNET.replace("to_q", "to_qkv"): low}), tmp_path)


def test_modules_trained_in_full_cannot_be_written(pipe, tmp_path):
    adapter = replace(tiny.trained(pipe), trained={"unet.conv_in": {"weight": torch.ones(1)}})
    with pytest.raises(AdapterError, match=r"no place for modules trained in full: unet.conv_in"):
        write_diffusers(adapter, tmp_path)


def test_adapter_of_no_pipeline_cannot_be_written(tmp_path):
    layers = {"blocks.0.attn.qkv": LowRankWeights(torch.ones(2, 4), torch.ones(6, 2), 2, 2.0, 6)}
    with pytest.raises(AdapterError, match=r"blocks.0.attn.qkv names no component of a diffusion pipeline"):
        write_diffusers(Adapter(layers), tmp_path)


# --- Written by diffusers ---------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0", "ff.net.0.proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["to_k", "to_v"], "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "target_modules": ["to_k", "conv1"], "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["to_q", "conv1"],
        "rank_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2, "conv1": 3},
        "alpha_pattern": {r".*attn2\.to_q": 9},
    },
}
TEXT_CONFIG = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "fc1"]}


def saved_by_diffusers(folder: Path, config: dict, metadata: bool = True, old_names: bool = False):
    """A pipeline with adapters that PEFT made, saved by diffusers; and their deltas as PEFT itself computes them."""
    pipe = tiny.stable_diffusion(folder / "tokenizer")
    configs = [peft.LoraConfig(init_lora_weights=False, **settings) for settings in (config, TEXT_CONFIG)]
    peft.inject_adapter_in_model(configs[0], pipe.unet)
    peft.inject_adapter_in_model(configs[1], pipe.text_encoder)
    rename = convert_state_dict_to_diffusers if old_names else dict
    states = [rename(peft.get_peft_model_state_dict(model)) for model in (pipe.unet, pipe.text_encoder)]
    about = {}
    if metadata:
        about["unet_lora_adapter_metadata"] = configs[0].to_dict()
        about["text_encoder_lora_adapter_metadata"] = configs[1].to_dict()
    pipe.save_lora_weights(folder, states[0], states[1], **about)
    deltas = {}
    for component in ("unet", "text_encoder"):
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                deltas[f"{component}.{name}"] = module.get_delta_weight("default").detach().flatten(1)
    return deltas


@pytest.mark.parametrize("old_names", [False, True], ids=["peft's names", "diffusers' names"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_file_that_diffusers_saved_reads_as_peft_computes_it(tmp_path, config, old_names):
    deltas = saved_by_diffusers(tmp_path, config, old_names=old_names)
    layers = named_as_in_files(read_diffusers(tmp_path))
    assert len(layers) == len(deltas)
    for name, wanted in deltas.items():
        assert torch.allclose(tiny.delta(layers[tiny.in_files(name)]), wanted, atol=1e-6), name


@pytest.mark.parametrize("config", [*CONFIGS.values(), {"target_modules": "all-linear"}], ids=[*CONFIGS, "all-linear"])
def test_file_that_a_model_saved_by_itself_reads_as_peft_computes_it(tmp_path, config):
    unet = tiny.unet_sdxl()
    unet.add_adapter(peft.LoraConfig(init_lora_weights=False, **config))
    unet.save_lora_adapter(tmp_path)
    layers = named_as_in_files(read_diffusers(tmp_path))
    adapted = {n: m for n, m in unet.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers.keys() == {f"unet.{name}" for name in adapted}
    for name, module in adapted.items():
        wanted = module.get_delta_weight("default").detach().flatten(1)
        assert torch.allclose(tiny.delta(layers[f"unet.{name}"]), wanted, atol=1e-6), name


def test_file_of_a_transformer_whose_names_tell_no_component_acts_in_its_pipeline(tmp_path):
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 32, "num_layers": 1}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 32}
    model = diffusers.WanTransformer3DModel(**sizes)
    given = torch.randn(1, 4, 1, 4, 4), torch.tensor([3.0]), torch.randn(1, 5, 16)
    plain = model(*given).sample
    theirs = deepcopy(model)
    targets = ["to_q", "to_out.0", "proj_out"]  # the last one is in other models too
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path)
    pipe = diffusers.WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model)
    vislora.apply(pipe, tmp_path)
    assert (model(*given).sample - plain).abs().max() > 0.01
    torch.testing.assert_close(model(*given).sample, theirs(*given).sample)
    with pytest.raises(AdapterError, match=r"^\S+ names no component of a diffusion pipeline"):
        write_diffusers(read_diffusers(tmp_path), tmp_path / "again")


@pytest.mark.parametrize("level", ["", "text_model."], ids=["flat", "as before transformers 5.6"])
def test_pattern_for_the_whole_name_of_a_text_encoders_layer_gives_its_alpha(tmp_path, level):
    model = tiny.clip()
    model = getattr(model, "text_model", model)
    if level:
        model = nn.ModuleDict({"text_model": model})
    own = rf"^{level}encoder.layers.0.self_attn.q_proj".replace(".", r"\.")
    config = peft.LoraConfig(**TEXT_CONFIG, init_lora_weights=False, alpha_pattern={own: 12})
    peft.inject_adapter_in_model(config, model)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=peft.get_peft_model_state_dict(model),
        text_encoder_lora_adapter_metadata=config.to_dict(),
    )
    layers = read_diffusers(tmp_path).layers
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            read = layers[f"text_encoder.text_model.{name.removeprefix(level)}"]
            assert torch.allclose(tiny.delta(read), module.get_delta_weight("default"), atol=1e-6), name


def test_file_without_metadata_has_scale_1_as_diffusers_takes_it(tmp_path):
    deltas = saved_by_diffusers(tmp_path, CONFIGS["plain"], metadata=False)
    layers = named_as_in_files(read_diffusers(tmp_path))
    for name, wanted in deltas.items():
        scale = 6 / 4 if name.startswith("unet") else 5 / 2
        assert torch.allclose(tiny.delta(layers[tiny.in_files(name)]) * scale, wanted, atol=1e-6)


def test_names_of_old_attention_processors_are_read(tmp_path):
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    old: dict[str, Tensor] = {}
    for ours, theirs in {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "attn1.processor.to_q_lora",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "attn2.processor.to_out_lora",
    }.items():
        start = "unet." + ours.partition(".attn")[0]
        old |= {f"{start}.{theirs}.down.weight": a, f"{start}.{theirs}.up.weight": b}
    start = "text_encoder.text_model.encoder.layers.0.self_attn"
    old |= {f"{start}.to_out_lora.down.weight": a, f"{start}.to_out_lora.up.weight": b}
    save_file({key: tensor.clone() for key, tensor in old.items()}, tmp_path / "old.safetensors")
    assert set(read_diffusers(tmp_path / "old.safetensors").layers) == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        f"{start}.out_proj",
    }


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_down", "lora_up")])
def test_alpha_beside_the_matrices_counts(tmp_path, down, up):
    tensors = {f"{UNET}.{down}.weight": torch.ones(4, 8), f"{UNET}.{up}.weight": torch.ones(8, 4)}
    save_file(tensors | {f"{UNET}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    assert read_diffusers(tmp_path / "a.safetensors").layers[UNET].scale == 0.5


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = {f"{UNET}.lora_A.weight": torch.ones(4, 8), f"{UNET}.lora_B.weight": torch.ones(8, 4)}
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    assert read_diffusers(tmp_path / "a.safetensors").layers[UNET].lora_A.dtype == torch.float32


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(pipe, tmp_path) -> dict[str, Tensor]:
    return load_file(write_diffusers(tiny.trained(pipe), tmp_path))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{UNET}.hada_w1_a", "LoHa can't be read"),
        (f"{UNET}.lokr_w1", "LoKr can't be read"),
        (f"{UNET}.lora_B.bias", "a trained bias can't be read"),
        (f"{UNET}.diff", "a weight changed in full can't be read"),
        (f"{UNET}.lora_C.weight", "its meaning isn't known"),
        ("unet.conv_in.weight", "its meaning isn't known"),
    ],
)
def test_key_that_would_be_lost_is_named(tensors, tmp_path, key, what):
    save_file(tensors | {key: torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=f"'{key}': {what}; it would be lost"):
        read_diffusers(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (None, f"{UNET} has no lora_B"),
        (torch.ones(8, 5), r"shapes \[3, 8\] and \[8, 5\]"),
        (torch.ones(8), "don't multiply"),
        (torch.ones(()), "don't multiply"),
        (torch.ones(0, 3), "don't multiply"),
    ],
)
def test_matrices_that_do_not_fit_are_named(tensors, tmp_path, matrix, message):
    tensors.pop(f"{UNET}.lora_B.weight")
    if matrix is not None:
        tensors[f"{UNET}.lora_B.weight"] = matrix
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_diffusers(tmp_path / "odd.safetensors")


def test_lora_B_of_a_convolution_with_a_kernel_is_refused(tensors, tmp_path):
    tensors |= {f"{UNET}.lora_A.weight": torch.ones(3, 8, 1, 1), f"{UNET}.lora_B.weight": torch.ones(8, 3, 3, 3)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=r"shapes \[3, 8, 1, 1\] and \[8, 3, 3, 3\], which don't multiply"):
        read_diffusers(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"init_lora_weights": "pissa"}, "a start that changes the base"),
        ({"peft_type": "LOHA"}, "only LORA can be read"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"use_dora": True}, "use_dora is True, and .* has no DoRA magnitude"),
        ({"lora_alpha": "x"}, "lora_alpha or alpha_pattern is malformed"),
        ({"lora_alpha": None}, "lora_alpha or alpha_pattern is malformed"),
        ({"alpha_pattern": {"(": 2}}, "lora_alpha or alpha_pattern is malformed"),
    ],
)
def test_settings_in_the_header_that_would_be_lost_are_named(tensors, tmp_path, settings, what):
    header = {f"unet.{key}": value for key, value in ({"r": 3, "lora_alpha": 3} | settings).items()}
    save_file(tensors, tmp_path / "odd.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(AdapterError, match=rf"odd\.safetensors.*{what}"):
        read_diffusers(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(math.nan), torch.tensor(1j)])
def test_alpha_that_is_no_number_is_refused(tensors, tmp_path, alpha):
    if alpha.is_complex():
        pytest.importorskip("safetensors", "0.7")  # others don't write it
    save_file(tensors | {f"{UNET}.alpha": alpha}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=f"{UNET} has rank 3 and alpha"):
        read_diffusers(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("end", ["lora.down.weight", "lora_A.weight"])
def test_layer_under_two_spellings_is_refused(tensors, tmp_path, end):
    key = f"{UNET}.{end}" if "down" in end else f"{UNET.removeprefix('unet.')}.{end}"
    save_file(tensors | {key: torch.ones(3, 8)}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match=f"is a second down matrix of {UNET}"):
        read_diffusers(tmp_path / "odd.safetensors")


def test_two_alphas_for_one_layer_are_refused(tmp_path):
    tensors = {f"{UNET}.lora_A.weight": torch.ones(4, 8), f"{UNET}.lora_B.weight": torch.ones(8, 4)}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(tensors | {f"{UNET}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors", header)
    with pytest.raises(AdapterError, match="an alpha of its own and one in the header"):
        read_diffusers(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", ["{", "[1]", "[" * 10**5, "1" * 5000], ids=["{", "[1]", "deep", "long"])
def test_malformed_header_is_refused(tensors, tmp_path, header):
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    with pytest.raises(AdapterError, match="lora_adapter_metadata in the header is"):
        read_diffusers(tmp_path / "a.safetensors")


def test_rslora_scale_is_alpha_over_the_root_of_the_rank(tmp_path):
    tensors = {f"{UNET}.lora_A.weight": torch.ones(4, 8), f"{UNET}.lora_B.weight": torch.ones(8, 4)}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert math.isclose(read_diffusers(tmp_path / "a.safetensors").layers[UNET].scale, 1.5)
