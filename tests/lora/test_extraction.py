"""Extracted adapters agree with dense SVDs in float64."""

import copy

import pytest
import timm
import torch
from dense import best, close, delta
from torch import nn

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer
from vislora.lora.adaptable import unadaptable
from vislora.lora.extraction import extract


def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        return timm.create_model("vit_tiny_patch16_224", **size).eval()


def tuned_matrices() -> nn.Module:
    """The same model with a random change of every matrix, of the norms' scales, and with a new head."""
    model = vit()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".weight"):
                p.add_(0.05 * torch.randn(p.shape))
    model.head = nn.Linear(48, 9)
    return model.eval()


def test_extracted_adapter_of_full_rank_gives_the_tuned_models_logits():
    images, tuned = torch.randn(3, 3, 32, 32), tuned_matrices()
    done = extract(vit().state_dict(), tuned.state_dict(), energy=1.0)
    norms = {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)} | {"norm"}
    assert done.adapter.trained.keys() == norms | {"head"}
    assert "patch_embed.proj" in done.adapter.layers
    assert min(done.energy.values()) == pytest.approx(1.0)
    model = vit()
    Adapters(model).load("extracted", done.adapter)
    assert (model(images) - tuned(images)).abs().max() < 1e-4


def test_depthwise_kernels_are_kept_in_full():
    tuned = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=5).eval()
    base = copy.deepcopy(tuned)
    with torch.no_grad():
        for name in ("stages.0.blocks.0.conv_dw", "stages.1.blocks.0.mlp.fc1", "stem.0"):
            tuned.get_submodule(name).weight.add_(0.05 * torch.randn_like(tuned.get_submodule(name).weight))
    done = extract(base.state_dict(), tuned.state_dict(), energy=1.0)
    assert done.adapter.layers.keys() == {"stages.1.blocks.0.mlp.fc1", "stem.0"}
    assert done.adapter.trained.keys() == {"stages.0.blocks.0.conv_dw"}
    images = torch.randn(2, 3, 32, 32)
    Adapters(base).load("extracted", done.adapter)
    assert (base(images) - tuned(images)).abs().max() < 1e-4


def test_what_cannot_be_adapted_is_kept_in_full_though_its_weight_is_a_matrix_by_shape():
    base = nn.Sequential(nn.Embedding(6, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape))
    done = extract(base.state_dict(), tuned.state_dict(), energy=1.0, unfit=unadaptable(base))
    assert (done.adapter.layers.keys(), done.adapter.trained.keys()) == ({"3"}, {"0", "1", "2"})
    Adapters(base).load("extracted", done.adapter)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(base[2:](x), tuned[2:](x), rtol=1e-4, atol=1e-4)
    assert torch.equal(base[0].weight, tuned[0].weight)


def test_weights_that_are_not_finite_are_refused_by_name():
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).state_dict()
    tuned = base | {"0.weight": base["0.weight"] + 1}
    for key in ("0.weight", "0.bias", "1.weight", "2.weight"):  # low-rank, beside it, a changed norm, the head
        with pytest.raises(AdapterError, match=rf"^the tuned weights are broken; not all .* finite in {key}$"):
            extract(base, tuned | {key: torch.full_like(base[key], torch.nan)}, rank=2, trained=["2"])
    with pytest.raises(AdapterError, match=r"^the base weights are broken; not all .* finite in 0\.weight$"):
        extract(base | {"0.weight": torch.full((4, 4), torch.inf)}, tuned, rank=2, trained=["2"])


@pytest.mark.parametrize(("name", "rank"), [("blocks.0.mlp.fc1", 5), ("blocks.0.mlp.fc2", 5), ("patch_embed.proj", 2)])
def test_extracted_layer_is_the_best_approximation_of_the_difference(name, rank):
    base, tuned = vit().state_dict(), tuned_matrices().state_dict()
    done = extract(base, tuned, rank)
    wanted, share = best((tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()).flatten(1).numpy(), rank)
    assert close(delta(done.adapter.layers[name]), wanted)
    assert done.energy[name] == pytest.approx(share, abs=1e-6)


def test_extracting_from_a_merged_model_gives_the_adapter_back():
    model = vit()
    adapters = Adapters(model)
    adapters.add(
        "it", [TargetLayer("blocks.0.attn.qkv", ((0, 48),)), TargetLayer("blocks.1.mlp.fc2")], LoraSettings(4, 8)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    value = adapters.adapter("it")
    adapters.merge()
    merged = {key: tensor for key, tensor in model.state_dict().items() if ".lora." not in key}
    done = extract(vit().state_dict(), merged, energy=0.999999)
    assert done.adapter.layers.keys() == value.layers.keys()
    for name, weights in value.layers.items():
        assert done.adapter.layers[name].rank == 4
        assert close(delta(done.adapter.layers[name]), delta(weights))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_change_of_a_lower_rank_than_asked_for_is_extracted_at_its_own(shape, dtype):
    g = torch.Generator().manual_seed(0)
    change = torch.randn(shape[0], 1, generator=g, dtype=dtype) @ torch.randn(1, shape[1], generator=g, dtype=dtype)
    done = extract({"fc.weight": torch.zeros(shape, dtype=dtype)}, {"fc.weight": change}, rank=8)
    assert done.adapter.layers["fc"].rank == 1
    assert close(delta(done.adapter.layers["fc"]), change.double().numpy())


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-5), (torch.float16, 1.0)])
def test_half_precision_weights_are_compared_in_full_precision(dtype, change):
    base = {"it.weight": torch.randn(8, 6).half()}
    tuned = {"it.weight": (base["it.weight"].float() + change * torch.randn(8, 6)).to(dtype)}
    wanted = tuned["it.weight"].double() - base["it.weight"].double()
    assert close(delta(extract(base, tuned, 6).adapter.layers["it"]), wanted.numpy())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_8_bits_are_compared_in_full_precision(dtype):
    base, tuned = ({"it.weight": torch.randn(8, 6).to(dtype), "norm.weight": torch.randn(6).to(dtype)} for _ in "ab")
    done = extract(base, tuned, 6)
    assert close(delta(done.adapter.layers["it"]), (tuned["it.weight"].double() - base["it.weight"].double()).numpy())
    assert done.adapter.trained["norm"]["weight"].dtype == dtype


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
def test_what_is_only_stored_in_another_precision_has_not_changed(base_dtype):
    base = {key: tensor.to(base_dtype) for key, tensor in vit().state_dict().items()}
    other = torch.float16 if base_dtype == torch.float32 else torch.float32
    tuned = {key: tensor.to(other) for key, tensor in base.items()}
    tuned["blocks.0.mlp.fc1.weight"] = tuned["blocks.0.mlp.fc1.weight"] + 0.1
    adapter = extract(base, tuned, 4).adapter
    assert adapter.layers.keys() == {"blocks.0.mlp.fc1"}
    assert not adapter.trained
    assert not adapter.biases


def test_changes_that_no_adapter_holds_are_refused_by_name_or_left_out_as_asked():
    base, tuned = vit().state_dict(), tuned_matrices().state_dict()
    tuned["blocks.0.attn.qkv.bias"] = tuned["blocks.0.attn.qkv.bias"] + 1
    tuned["pos_embed"] = tuned["pos_embed"] + 1
    with pytest.raises(
        AdapterError, match=r"1 changed tensors .* pos_embed; leave them out with 'ignore=\[pos_embed\]'"
    ):
        extract(base, tuned, 4)
    done = extract(base, tuned, 4, ignore=["*.bias", "pos_embed"])
    assert set(done.ignored) == {"pos_embed", "blocks.0.attn.qkv.bias"}
    assert not done.adapter.biases
    kept = extract(base, tuned, 4, trained=["blocks.0.attn.qkv"], ignore=["pos_embed"])
    assert torch.equal(kept.adapter.trained["blocks.0.attn.qkv"]["bias"], tuned["blocks.0.attn.qkv.bias"])
    assert "blocks.0.attn.qkv" not in kept.adapter.layers
    assert kept.ignored == ("pos_embed",)


def test_pattern_that_fits_no_tensor_is_refused():
    base, tuned = vit().state_dict(), tuned_matrices().state_dict()
    assert extract(base, tuned, 4, ignore=["pos_embed"]).ignored == ()  # it didn't change
    with pytest.raises(AdapterError, match=r"ignore=\['posembed'\]: the tuned weights hold no tensor of such a name"):
        extract(base, tuned, 4, ignore=["pos_embed", "posembed"])


def test_biases_of_adapted_layers_are_kept():
    images, tuned = torch.randn(3, 3, 32, 32), tuned_matrices()
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name.endswith(".bias"):
                p.add_(0.3 * torch.randn(p.shape))
    done = extract(vit().state_dict(), tuned.state_dict(), energy=1.0)
    assert "blocks.0.attn.qkv.bias" in done.adapter.biases
    assert not [name for name in done.adapter.biases if "norm" in name]  # norms are kept in full
    model = vit()
    Adapters(model).load("extracted", done.adapter)
    assert (model(images) - tuned(images)).abs().max() < 1e-4


def test_a_parameter_of_a_module_that_holds_adapted_layers_is_refused():
    base = {"attn.q_bias": torch.zeros(4), "attn.qkv.weight": torch.zeros(4, 4)}
    tuned = {"attn.q_bias": torch.ones(4), "attn.qkv.weight": torch.ones(4, 4)}
    with pytest.raises(AdapterError, match="q_bias"):
        extract(base, tuned, 2)


def test_models_of_different_architectures_and_equal_models_are_refused():
    base = vit().state_dict()
    with pytest.raises(AdapterError, match=r"the tuned weights lack blocks.1.norm1.weight"):
        extract(base, {k: t for k, t in tuned_matrices().state_dict().items() if "blocks.1" not in k}, 4)
    bare = {key: tensor for key, tensor in base.items() if key != "blocks.0.attn.qkv.bias"}
    with pytest.raises(AdapterError, match=r"the base weights lack blocks\.0\.attn\.qkv\.bias; base and tuned"):
        extract(bare, tuned_matrices().state_dict(), 4)
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(base, vit().state_dict(), 4)
    with pytest.raises(AdapterError, match="no such module"):
        extract(base, tuned_matrices().state_dict(), 4, trained=["classifier"])
