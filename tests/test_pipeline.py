"""Adapters in pipelines draw the images that diffusers draws with PEFT, and come out without a trace."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from quantised import quantise
from safetensors.torch import load_file
from torch import Tensor, nn

import vislora
from vislora.blend import blend
from vislora.compose import configure
from vislora.config.model import PipelineConfig
from vislora.errors import AdapterError
from vislora.formats.detect import write_adapter
from vislora.lora import Adapter
from vislora.models.diffusion import EMBEDDED, load_pipeline


class SimpleHashable(SimpleNamespace):
    """A pipeline that has nothing but components."""

    __hash__ = object.__hash__


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
PIPELINES: dict[str, Callable[[Path], Any]] = {"sd": tiny.stable_diffusion, "sdxl": tiny.stable_diffusion_xl}
STEP = 1 / 255


def everything(name: str) -> bool:
    """The projections of attention and text, feed-forward layers, proj_in, residual convolutions."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return name.endswith((*ends, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"))


@pytest.fixture(params=PIPELINES)
def pipe(request, tmp_path) -> Any:
    return PIPELINES[request.param](tmp_path / "tokenizer")


@pytest.fixture
def sd(tmp_path) -> Any:
    return tiny.stable_diffusion(tmp_path / "tokenizer")


def drawn_by_diffusers(pipe: Any, file: Path, scale: float) -> Tensor:
    return loaded_by_diffusers(copy.deepcopy(pipe), file, scale)


def loaded_by_diffusers(pipe: Any, file: Path, scale: float) -> Tensor:
    pytest.importorskip("peft")
    pipe.load_lora_weights(str(file))
    pipe.set_adapters(pipe.get_active_adapters(), [scale])
    return tiny.draw(pipe)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_images_are_those_that_diffusers_draws(pipe, tmp_path, to, scale):
    adapter = tiny.trained(pipe, everything)
    file = write_adapter(adapter, to, tmp_path / "style.safetensors")
    plain, theirs = tiny.draw(pipe), drawn_by_diffusers(pipe, file, scale)
    vislora.apply(pipe, file, scale=scale)
    ours = tiny.draw(pipe)
    vislora.unapply(pipe)
    vislora.apply(pipe, adapter, scale=scale)
    assert (ours - plain).abs().max() > 20 * STEP
    assert (ours - theirs).abs().max() <= STEP
    assert (tiny.draw(pipe) - theirs).abs().max() <= STEP


def test_mixed_ranks_and_scales_give_the_images_that_diffusers_draws(pipe, tmp_path):
    adapter = tiny.trained(pipe, everything, lambda name: 1 + len(name) % 3, lambda name: 0.5 + 0.7 * (len(name) % 4))
    for to in ("diffusers", "kohya"):
        file = write_adapter(adapter, to, tmp_path / f"{to}.safetensors")
        vislora.apply(pipe, file)
        ours = tiny.draw(pipe)
        vislora.unapply(pipe)
        assert (ours - drawn_by_diffusers(pipe, file, 1.0)).abs().max() <= STEP


@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_unet_of_other_levels_than_sdxls_gives_the_images_that_diffusers_draws(tmp_path, layers_per_block):
    pipe = tiny.stable_diffusion_xl(tmp_path / "tokenizer")
    pipe.unet = tiny.unet_sdxl(layers_per_block)
    adapter = tiny.trained(pipe, everything)
    vislora.apply(pipe, adapter)
    ours = tiny.draw(pipe)
    vislora.unapply(pipe)
    file = write_adapter(adapter, "kohya", tmp_path / "style.safetensors")
    assert (ours - drawn_by_diffusers(pipe, file, 1.0)).abs().max() <= STEP
    vislora.apply(pipe, file)
    assert (tiny.draw(pipe) - ours).abs().max() <= STEP


def test_dora_gives_the_images_that_diffusers_draws(sd, tmp_path):
    plain = tiny.draw(sd)
    vislora.apply(sd, tiny.trained(sd, everything))
    without = tiny.draw(sd)
    vislora.unapply(sd)
    file = write_adapter(tiny.trained(sd, everything, dora=True), "diffusers", tmp_path)
    theirs = drawn_by_diffusers(sd, file, 1.0)
    vislora.apply(sd, file)
    ours = tiny.draw(sd)
    assert min((ours - other).abs().max() for other in (plain, without)) > 5 * STEP
    assert (ours - theirs).abs().max() <= STEP


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def test_transformer_computes_what_diffusers_computes_with_the_same_file(tmp_path):
    pytest.importorskip("peft")
    pipe = SimpleHashable(transformer=sd3().eval())
    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 16), torch.tensor([3, 7]))
    adapter = tiny.trained(
        pipe,
        lambda name: name.endswith(("to_q", "add_k_proj", "to_out.0", "ff.net.2", "proj_out")),
        lambda name: 1 + len(name) % 3,
        components=["transformer"],
    )
    write_adapter(adapter, "diffusers", tmp_path)
    theirs = copy.deepcopy(pipe.transformer)
    theirs.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        plain = pipe.transformer(*inputs).sample
        vislora.apply(pipe, tmp_path)
        ours = pipe.transformer(*inputs).sample
        assert (ours - plain).abs().max() > 0.1
        assert torch.allclose(ours, theirs(*inputs).sample, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_quantised_pipeline_draws_what_diffusers_draws(tmp_path, scale):
    ours, theirs = tiny.flux(tmp_path / "ours"), tiny.flux(tmp_path / "theirs")
    chosen = ("to_q", "to_v", "to_out.0", "add_q_proj", "norm1.linear", "ff.net.2", "proj_out")
    adapter = tiny.trained(
        ours, lambda name: name.endswith(chosen), alpha=lambda name: 24.0, components=["transformer"]
    )
    file = write_adapter(adapter, "diffusers", tmp_path / "style.safetensors")
    for pipe in (ours, theirs):
        quantise(pipe.transformer, "class")
    kinds = [type(module).__name__ for module in ours.transformer.modules()]
    assert kinds.count("GGUFLinear") > 10
    plain = tiny.draw(ours)
    vislora.apply(ours, file, scale=scale)
    drawn = tiny.draw(ours)
    assert (drawn - plain).abs().max() > 20 * STEP
    assert (drawn - loaded_by_diffusers(theirs, file, scale)).abs().max() <= STEP
    vislora.unapply(ours)
    assert torch.equal(tiny.draw(ours), plain)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_embedded_pipeline_draws_what_diffusers_draws(tmp_path, scale):
    if not (EMBEDDED / "model_index.json").is_file():
        pytest.skip("the embedded pipeline isn't there; assets/pretrain_diffusion.py makes it")
    pipe = load_pipeline(PipelineConfig("embedded"))
    adapter = tiny.trained(pipe, everything, components=["unet"])
    quiet = {n: replace(w, alpha=w.alpha / 20) for n, w in adapter.layers.items()}  # so that birds remain birds
    options = {"num_inference_steps": 4, "height": 64, "width": 64}
    for to in ("diffusers", "kohya"):
        file = write_adapter(Adapter(quiet), to, tmp_path / f"{to}.safetensors")
        applied = vislora.apply(pipe, file, scale=scale)
        ours = tiny.draw(pipe, **options)
        applied.scale = 0.0
        plain = tiny.draw(pipe, **options)
        vislora.unapply(pipe)
        theirs = copy.deepcopy(pipe)
        theirs.load_lora_weights(str(file))
        theirs.set_adapters(theirs.get_active_adapters(), [scale])
        assert (ours - plain).abs().max() > 5 * STEP
        assert (ours - tiny.draw(theirs, **options)).abs().max() <= STEP


# --- In and out -------------------------------------------------------------------------------------------------------


def traces(pipe: Any) -> dict[str, Any]:
    """What could tell that something was there: module objects, their classes and attributes, parameters, flags."""
    found: dict[str, Any] = {}
    for component, model in pipe.components.items():
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                found[f"{component}.{name}"] = (id(module), type(module), module.training, sorted(vars(module)))
            for name, parameter in model.named_parameters():
                found[f"{component}.{name} "] = (id(parameter), parameter.requires_grad, parameter.detach().clone())
    return found


def test_unapply_leaves_the_pipeline_bit_for_bit_as_it_was(pipe):
    pipe.unet.conv_in.requires_grad_(False)
    image = tiny.draw(pipe)
    before = traces(pipe)
    applied = vislora.apply(pipe, tiny.trained(pipe, everything), scale=0.7)
    tiny.draw(pipe)
    applied.swap(tiny.trained(pipe), scale=2.0)
    vislora.unapply(pipe)
    after = traces(pipe)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value[:2] == after[name][:2], name
        same = torch.equal(value[2], after[name][2]) if isinstance(value[2], Tensor) else value == after[name]
        assert same, name
    assert torch.equal(tiny.draw(pipe), image)


def test_pipeline_opened_and_adapted_in_inference_mode_is_used_outside(tmp_path):
    with torch.inference_mode():
        pipe = tiny.stable_diffusion(tmp_path)
    before = traces(pipe)
    plain = tiny.draw(pipe)
    with torch.inference_mode():
        applied = vislora.apply(pipe, tiny.trained(pipe))
    drawn = tiny.draw(pipe)
    narrow = {name: replace(w, lora_A=w.lora_A[:, 1:]) for name, w in tiny.trained(pipe).layers.items()}
    with pytest.raises(AdapterError, match="has shape"):
        applied.swap(Adapter(narrow))
    assert torch.equal(tiny.draw(pipe), drawn)
    vislora.unapply(pipe)
    assert {name: value[:2] for name, value in traces(pipe).items()} == {name: v[:2] for name, v in before.items()}
    assert torch.equal(tiny.draw(pipe), plain)


def test_scale_0_is_the_base_model_and_another_scale_acts_at_once(sd):
    plain = tiny.draw(sd)
    applied = vislora.apply(sd, tiny.trained(sd), scale=0.0)
    assert torch.equal(tiny.draw(sd), plain)
    applied.scale = 1.0
    full = tiny.draw(sd)
    applied.scale = 0.5
    assert applied.scale == 0.5
    assert not torch.equal(tiny.draw(sd), full)
    applied.scale = 1.0
    assert torch.equal(tiny.draw(sd), full)


def test_swapped_adapter_draws_as_if_it_had_been_applied_first(sd):
    first, second = tiny.trained(sd), tiny.trained(sd, everything, components=["unet"])
    vislora.apply(sd, second, scale=0.8)
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    applied = vislora.apply(sd, first)
    applied.swap(second, scale=0.8)
    assert torch.equal(tiny.draw(sd), wanted)
    applied.swap(first)
    applied.swap(second)
    assert applied.scale == 0.8
    assert torch.equal(tiny.draw(sd), wanted)


def test_adapter_that_does_not_fit_leaves_the_old_one_at_work(sd):
    applied = vislora.apply(sd, tiny.trained(sd), scale=0.6)
    before = tiny.draw(sd)
    foreign = {name.replace("mid_block", "middle_block"): w for name, w in tiny.trained(sd).layers.items()}
    with pytest.raises(AdapterError, match="this pipeline has no module"):
        applied.swap(Adapter(foreign))
    assert applied.scale == 0.6
    assert torch.equal(tiny.draw(sd), before)


def test_adapter_that_does_not_fit_leaves_no_trace(sd, tmp_path):
    xl = tiny.stable_diffusion_xl(tmp_path / "xl")
    before = traces(sd)
    with pytest.raises(AdapterError, match="layers for text_encoder_2, which StableDiffusionPipeline doesn't have"):
        vislora.apply(sd, tiny.trained(xl, components=["text_encoder_2"]))
    with pytest.raises(AdapterError, match=r"this pipeline has no module|has shape"):
        vislora.apply(sd, tiny.trained(xl, components=["unet"]))
    assert {name: value[:2] for name, value in traces(sd).items()} == {name: v[:2] for name, v in before.items()}
    with pytest.raises(AdapterError, match="no adapter that apply put in"):
        vislora.unapply(sd)


def assert_of_no_use(applied, pipe, why):
    for use in (
        lambda: applied.swap(tiny.trained(pipe)),
        lambda: setattr(applied, "scale", 0.5),
        lambda: applied.adapter,
    ):
        with pytest.raises(AdapterError, match=why):
            use()


def test_handle_is_of_no_use_once_its_adapter_is_out(sd):
    plain = tiny.draw(sd)
    applied = vislora.apply(sd, tiny.trained(sd))
    vislora.unapply(sd)
    assert_of_no_use(applied, sd, "unapply took this adapter out of the pipeline")
    assert torch.equal(tiny.draw(sd), plain)


def test_handle_is_of_no_use_once_a_model_was_replaced(sd):
    plain = tiny.draw(sd)
    applied = vislora.apply(sd, tiny.trained(sd))
    sd.unet = tiny.unet()
    assert_of_no_use(applied, sd, "the pipeline's unet was replaced after the adapter was applied")
    vislora.unapply(sd)
    assert torch.equal(tiny.draw(sd), plain)
    vislora.apply(sd, tiny.trained(sd)).scale = 0.5
    assert not torch.equal(tiny.draw(sd), plain)


def test_scale_acts_where_a_model_was_wrapped_or_let_go(sd):
    plain = tiny.draw(sd)
    applied = vislora.apply(sd, tiny.trained(sd, components=["unet"]))
    encoder = sd.text_encoder
    sd.unet, sd.text_encoder = torch.compile(sd.unet, backend="eager"), None
    applied.scale = 0.0
    sd.text_encoder = encoder
    assert torch.equal(tiny.draw(sd), plain)


def test_dropped_pipeline_frees_its_memory_at_once(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "tokenizer")
    unet = weakref.ref(pipe.unet)
    vislora.apply(pipe, tiny.trained(pipe))
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert unet() is None
    finally:
        gc.enable()


def test_adapter_in_a_copy_of_a_pipeline_is_taken_out_by_itself(sd):
    plain = tiny.draw(sd)
    vislora.apply(sd, tiny.trained(sd))
    drawn = tiny.draw(sd)
    other = copy.deepcopy(sd)
    assert torch.equal(tiny.draw(other), drawn)
    vislora.unapply(other)
    assert torch.equal(tiny.draw(other), plain)
    assert torch.equal(tiny.draw(sd), drawn)


def test_adapter_that_a_shallow_copy_shares_comes_out_of_both(sd):
    plain, adapter = tiny.draw(sd), tiny.trained(sd)
    applied = vislora.apply(sd, adapter)
    vislora.unapply(copy.copy(sd))
    assert torch.equal(tiny.draw(sd), plain)
    with pytest.raises(AdapterError, match="no adapter that apply put in; one that it shared with a copy comes out of"):
        vislora.unapply(sd)
    assert_of_no_use(applied, sd, "unapply took this adapter out of the pipeline")
    vislora.apply(sd, adapter)
    assert not torch.equal(tiny.draw(sd), plain)
    vislora.unapply(sd)
    assert torch.equal(tiny.draw(sd), plain)


def test_pipeline_is_saved_without_its_adapter(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "before")
    applied = vislora.apply(pipe, tiny.trained(pipe))
    applied.swap(tiny.trained(pipe, everything))
    drawn = tiny.draw(pipe)
    pipe.save_pretrained(tmp_path / "meanwhile")
    assert torch.equal(tiny.draw(pipe), drawn)
    files = sorted((tmp_path / "before").rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        before, meanwhile = load_file(file), load_file(tmp_path / "meanwhile" / file.relative_to(tmp_path / "before"))
        torch.testing.assert_close(meanwhile, before, rtol=0, atol=0)


def test_weights_of_another_base_are_loaded_under_an_adapter(sd, tmp_path):
    other = {name: weight + 0.01 for name, weight in sd.unet.state_dict().items()}
    adapter = tiny.trained(sd)
    plain = copy.deepcopy(sd)
    applied = vislora.apply(sd, tiny.trained(sd, everything))
    applied.swap(adapter)
    sd.unet.load_state_dict(other)
    plain.unet.load_state_dict(other)
    vislora.apply(plain, adapter)
    assert torch.equal(tiny.draw(sd), tiny.draw(plain))


@pytest.mark.parametrize("scale", ["0.5", None, float("nan"), torch.ones(2)])
def test_scale_that_is_no_number_changes_nothing(sd, scale):
    applied = vislora.apply(sd, tiny.trained(sd), scale=0.5)
    drawn = tiny.draw(sd)
    with pytest.raises(AdapterError, match=r"scale=.*: expected a finite number"):
        applied.scale = scale
    if scale is not None:
        with pytest.raises(AdapterError, match=r"scale=.*: expected a finite number"):
            applied.swap(tiny.trained(sd, everything), scale=scale)
    assert applied.scale == 0.5
    assert torch.equal(tiny.draw(sd), drawn)


def test_layers_that_peft_has_wrapped_are_refused(pipe, tmp_path):
    pytest.importorskip("peft")
    file = write_adapter(tiny.trained(pipe), "diffusers", tmp_path)
    plain = tiny.draw(pipe)
    pipe.load_lora_weights(str(file))
    with pytest.raises(AdapterError, match=r"is wrapped by PEFT; call pipe.unload_lora_weights\(\) first"):
        vislora.apply(pipe, file)
    pipe.unload_lora_weights()
    vislora.apply(pipe, file)
    assert not torch.equal(tiny.draw(pipe), plain)


def test_adapter_that_peft_has_wrapped_acts_beside_pefts_and_is_taken_out_after_it(sd, tmp_path):
    pytest.importorskip("peft")
    plain, file = tiny.draw(sd), write_adapter(tiny.trained(sd, everything), "diffusers", tmp_path)
    applied = vislora.apply(sd, file, scale=2.0)
    twice = tiny.draw(sd)
    applied.scale = 1.0
    sd.load_lora_weights(str(file))
    assert (tiny.draw(sd) - twice).abs().max() < 1e-4 < (twice - plain).abs().max()
    with pytest.raises(AdapterError, match="or adapted by another Adapters object or PEFT, since"):
        vislora.unapply(sd)
    sd.unload_lora_weights()
    vislora.unapply(sd)
    assert torch.equal(tiny.draw(sd), plain)


@pytest.mark.parametrize("order", [1, -1])
def test_text_encoder_of_pefts_folder_and_of_kohyas_file_add_up(sd, tmp_path, order):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        copy.deepcopy(sd.text_encoder), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "folder" / "text_encoder")
    adapter = tiny.trained(sd, lambda name: name.endswith(("q_proj", "fc1")), components=["text_encoder"])
    write_adapter(adapter, "kohya", tmp_path / "file.safetensors")
    theirs = copy.deepcopy(sd)
    with torch.no_grad():
        theirs.text_encoder = model.merge_and_unload()
        for name, low in adapter.layers.items():
            theirs.text_encoder.get_submodule(name.removeprefix("text_encoder.")).weight += tiny.delta(low)
    sources = [tmp_path / "folder", tmp_path / "file.safetensors"][::order]
    plain = tiny.draw(sd)
    vislora.apply(sd, sources)
    assert (tiny.draw(sd) - tiny.draw(theirs)).abs().max() < 1e-5
    assert (tiny.draw(sd) - plain).abs().max() > 1e-2
    vislora.unapply(sd)
    words = [f"adapter=[{','.join(map(str, sources))}]", "weights=[1,1]", "how=cat", f"out={tmp_path / 'both'}"]
    blend(configure("blend", words))
    vislora.apply(sd, tmp_path / "both")
    assert (tiny.draw(sd) - tiny.draw(theirs)).abs().max() < 1e-5


def test_bare_folder_of_a_text_encoder_is_known_as_one(sd, tmp_path):
    written = write_adapter(tiny.trained(sd, components=["text_encoder"]), "peft", tmp_path)
    vislora.apply(sd, written)
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    vislora.apply(sd, written / "text_encoder")
    assert torch.equal(tiny.draw(sd), wanted)


def test_second_apply_is_refused(sd):
    vislora.apply(sd, tiny.trained(sd))
    with pytest.raises(AdapterError, match="has an adapter already; swap it, or unapply it first"):
        vislora.apply(sd, tiny.trained(sd))


def test_apply_to_a_pipeline_that_shares_an_adapted_model_says_what_to_do(sd):
    adapter = tiny.trained(sd)
    vislora.apply(sd, adapter)
    other = diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    with pytest.raises(AdapterError, match=r"unet has an adapter already, .* vislora\.unapply of the one that"):
        vislora.apply(other, adapter)
    vislora.unapply(sd)
    vislora.apply(other, adapter)


# --- Several at once --------------------------------------------------------------------------------------------------


def merged_by_hand(pipe: Any, parts: list[tuple[Adapter, float]]) -> Tensor:
    pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        for adapter, factor in parts:
            for name, weights in adapter.layers.items():
                component, _, module = name.partition(".")
                weight = getattr(pipe, component).get_submodule(module).weight
                weight += factor * tiny.delta(weights).view(weight.shape)
    return tiny.draw(pipe)


def test_several_adapters_act_as_the_weighted_sum_of_their_updates(pipe, tmp_path):
    one = tiny.trained(pipe, rank=lambda name: 2)
    other = tiny.trained(pipe, everything, alpha=lambda name: 1.0, components=["unet"])
    file = write_adapter(one, "kohya", tmp_path / "one.safetensors")
    applied = vislora.apply(pipe, [file, other], weights=[0.7, -0.4])
    blended = tiny.draw(pipe)
    applied.scale = 0.5
    half = tiny.draw(pipe)
    vislora.unapply(pipe)
    assert (blended - merged_by_hand(pipe, [(one, 0.7), (other, -0.4)])).abs().max() <= STEP
    assert (half - merged_by_hand(pipe, [(one, 0.35), (other, -0.2)])).abs().max() <= STEP
    vislora.apply(pipe, [file, other], weights=torch.tensor([0.7, -0.4]))
    assert (tiny.draw(pipe) - blended).abs().max() <= STEP


def test_list_of_one_adapter_is_that_one(sd):
    adapter = tiny.trained(sd)
    vislora.apply(sd, adapter)
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    vislora.apply(sd, [adapter])
    assert torch.equal(tiny.draw(sd), wanted)


def test_list_of_no_adapter_is_refused(sd):
    with pytest.raises(AdapterError, match=r"adapter=\[\] names no adapter; give one or more"):
        vislora.apply(sd, [])


def test_adapter_of_something_that_is_no_layer_is_refused(sd):
    (weights, *_) = tiny.trained(sd, components=["unet"]).layers.values()
    with pytest.raises(AdapterError, match=r"unet\.mid_block is a UNetMidBlock2DCrossAttn"):
        vislora.apply(sd, Adapter({"unet.mid_block": weights}))


def test_weights_belong_to_several_adapters(sd):
    with pytest.raises(AdapterError, match="weights are for several adapters; give one adapter a scale"):
        vislora.apply(sd, tiny.trained(sd), weights=[0.5])


# --- Pipelines in other states ----------------------------------------------------------------------------------------


def test_adapter_of_a_bare_unet_acts_in_the_pipeline(sd, tmp_path):
    adapter = tiny.trained(sd, components=["unet"])
    vislora.apply(sd, adapter)
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    vislora.apply(sd, write_adapter(adapter, "peft", tmp_path / "adapter") / "unet")
    assert torch.equal(tiny.draw(sd), wanted)


def test_matrices_of_a_linear_layer_fit_a_convolution_of_one_pixel(sd):
    adapter = tiny.trained(sd, lambda name: name.endswith("proj_in"), components=["unet"])
    vislora.apply(sd, adapter)
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    flat = {
        name: type(w)(w.lora_A.flatten(1), w.lora_B.flatten(1), w.rank, w.alpha, w.out)
        for name, w in adapter.layers.items()
    }
    vislora.apply(sd, Adapter(flat))
    assert torch.equal(tiny.draw(sd), wanted)


def test_fused_projections_are_refused_rather_than_left_dead(sd):
    sd.fuse_qkv_projections()
    with pytest.raises(AdapterError, match="isn't used while projections are fused; call unfuse_qkv_projections"):
        vislora.apply(sd, tiny.trained(sd))
    sd.unfuse_qkv_projections()
    plain = tiny.draw(sd)
    vislora.apply(sd, tiny.trained(sd))
    assert not torch.equal(tiny.draw(sd), plain)


def test_layers_whose_forward_is_hidden_are_refused(sd):
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    add_hook_to_module(layer, ModelHook())  # as sequential offload does with every layer
    with pytest.raises(AdapterError, match=r"attn1.to_q has a forward of its own, as sequential and group offloading"):
        vislora.apply(sd, tiny.trained(sd))


def test_component_with_a_hook_as_model_offload_puts_it_draws_the_same(sd):
    from accelerate.hooks import ModelHook, add_hook_to_module

    vislora.apply(sd, tiny.trained(sd))
    wanted = tiny.draw(sd)
    vislora.unapply(sd)
    add_hook_to_module(sd.unet, ModelHook())
    vislora.apply(sd, tiny.trained(sd))
    assert torch.equal(tiny.draw(sd), wanted)
