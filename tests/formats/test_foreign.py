"""What other programs wrote for transformers acts as diffusers has it act, through its own converters; what those would
lose is refused."""

from importlib.metadata import version
from pathlib import Path

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import vislora
from vislora.compose import configure
from vislora.errors import AdapterError, ModelError
from vislora.export import export
from vislora.formats.detect import read_adapter
from vislora.generate import generate

PEFT, KOHYA, XLABS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".down.weight", ".up.weight"),
)
WIDTH = 32  # of the tiny Flux
FLUX = {  # Black Forest Labs' layers: (in, out)
    "double_blocks.0.img_attn.qkv": (WIDTH, 3 * WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "double_blocks.0.txt_attn.qkv": (WIDTH, 3 * WIDTH),
    "double_blocks.0.img_mlp.2": (4 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (5 * WIDTH, WIDTH),
}


def pairs(
    layers: dict[str, tuple[int, int]], ends: tuple[str, str], alpha: float | None = None, rank: int = 4
) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(2)
    tensors = {}
    for name, (width, out) in layers.items():
        tensors[f"{name}{ends[0]}"] = torch.randn(rank, width, generator=draws) / width**0.5
        tensors[f"{name}{ends[1]}"] = torch.randn(out, rank, generator=draws) / rank**0.5
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"lora_unet_{name.replace('.', '_')}": size for name, size in layers.items()}


def comfy(layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"diffusion_model.{name}": size for name, size in layers.items()}


def saved(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "theirs.safetensors")
    return folder / "theirs.safetensors"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> diffusers.FluxPipeline:
    return tiny.flux(tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("tensors", [pairs(kohya(FLUX), KOHYA, alpha=2.0), pairs(comfy(FLUX), KOHYA)])
def test_pictures_are_those_of_diffusers(flux, tmp_path, tensors):
    pytest.importorskip("peft")
    file = saved(tensors, tmp_path)
    plain = tiny.draw(flux)
    vislora.apply(flux, file)
    ours = tiny.draw(flux)
    vislora.unapply(flux)
    flux.load_lora_weights(str(file))
    theirs = tiny.draw(flux)
    flux.unload_lora_weights()
    assert (ours - plain).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(tiny.draw(flux), plain)


def test_comfyuis_names_are_read_whichever_way_their_matrices_are_called(tmp_path):
    found = [read_adapter(saved(pairs(comfy(FLUX), ends), tmp_path), diffusers.FluxPipeline) for ends in (KOHYA, PEFT)]
    assert len(found[0].layers) >= len(FLUX)
    assert found[0].equals(found[1])


def test_pictures_are_those_of_a_transformer_that_saved_its_adapter_by_itself(tmp_path):
    peft = pytest.importorskip("peft")
    theirs, flux = tiny.flux(tmp_path), tiny.flux(tmp_path)
    plain = tiny.draw(flux)
    targets = ["to_q", "to_v", "proj_mlp", "norm_out.linear"]
    config = peft.LoraConfig(r=4, lora_alpha=24, target_modules=targets, init_lora_weights=False)
    theirs.transformer.add_adapter(config)
    theirs.transformer.save_lora_adapter(tmp_path)
    vislora.apply(flux, tmp_path)
    assert (tiny.draw(flux) - plain).abs().max() > 0.01
    assert (tiny.draw(flux) - tiny.draw(theirs)).abs().max() < 1e-5


def test_fused_layers_come_apart_by_rows_at_their_scale(tmp_path):
    tensors = pairs(kohya({"double_blocks.0.img_attn.qkv": (8, 24)}), KOHYA, alpha=2.0)
    layers = read_adapter(saved(tensors, tmp_path), diffusers.FluxPipeline).layers
    a, b = tensors.values() if len(tensors) == 2 else list(tensors.values())[:2]
    whole = 2.0 / 4 * b @ a
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        found = tiny.delta(layers[f"transformer.transformer_blocks.0.attn.{part}"])
        torch.testing.assert_close(found, whole[8 * i : 8 * i + 8])


@pytest.mark.skipif(tiny.DIFFUSERS < (0, 42), reason="its converter drops them, and the file is refused")
@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_text_encoder_beside_the_transformer_has_its_own_scale(tmp_path, alpha):
    names = ("self_attn.q_proj", "mlp.fc1")
    text = {f"lora_te1_text_model_encoder_layers_0_{name.replace('.', '_')}": (16, 16) for name in names}
    text = pairs(text, KOHYA, alpha)
    layers = read_adapter(saved(pairs(kohya(FLUX), KOHYA, 2.0) | text, tmp_path), diffusers.FluxPipeline).layers
    downs, ups = ([tensor for key, tensor in text.items() if key.endswith(end)] for end in KOHYA)
    for name, a, b in zip(names, downs, ups, strict=True):
        found = tiny.delta(layers[f"text_encoder.text_model.encoder.layers.0.{name}"])
        torch.testing.assert_close(found, (1.0 if alpha is None else alpha / 4) * b @ a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_file_in_16_bits_is_converted_without_rounding_once_more(tmp_path, dtype):
    half = {key: tensor.to(dtype) for key, tensor in pairs(kohya(FLUX), KOHYA, alpha=3.0).items()}
    found, exact = (
        read_adapter(saved(tensors, tmp_path), diffusers.FluxPipeline)
        for tensors in (half, {key: tensor.float() for key, tensor in half.items()})
    )
    assert found.equals(exact)


QWEN = {"transformer_blocks.1.attn.to_q": (16, 16), "transformer_blocks.1.attn.to_out.0": (16, 16)}
WAN = {f"blocks.0.{kind}_attn.{part}": (16, 16) for kind in ("self", "cross") for part in "qkvo"}
WAN |= {"blocks.0.ffn.0": (16, 64), "blocks.0.ffn.2": (64, 16)}
Z_IMAGE = {"layers.1.attention.to_q": (16, 16), "layers.1.attention.to_out.0": (16, 16)}
FLUX2 = {"double_blocks.1.img_attn.proj": (16, 16)}
BY_XLABS = {"double_blocks.1.processor.proj_lora1": (16, 16)}
BY_ONETRAINER = {"lora_transformer_transformer_blocks_1_attn_to_out_0": (16, 16)}
IN_WAN = tuple(f"blocks.0.attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0"))
IN_WAN += ("blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2")
IN_FLUX = ("transformer_blocks.1.attn.to_out.0",)
SINCE_037 = pytest.mark.skipif(version("diffusers").startswith("0.36."), reason="diffusers 0.36 can't convert these")


@pytest.mark.parametrize(
    ("pipeline", "tensors", "names"),
    [
        ("WanPipeline", pairs(comfy(WAN), PEFT), IN_WAN),
        ("WanPipeline", pairs(kohya(WAN), KOHYA, alpha=1.0), IN_WAN),
        ("QwenImagePipeline", pairs(comfy(QWEN), PEFT), tuple(QWEN)),
        ("QwenImagePipeline", pairs(kohya(QWEN), KOHYA, alpha=1.0), tuple(QWEN)),
        ("QwenImagePipeline", pairs(QWEN, KOHYA, alpha=1.0), tuple(QWEN)),
        ("ZImagePipeline", pairs(comfy(Z_IMAGE), PEFT), tuple(Z_IMAGE)),
        pytest.param("ZImagePipeline", pairs(kohya(Z_IMAGE), KOHYA, alpha=1.0), tuple(Z_IMAGE), marks=SINCE_037),
        pytest.param("Flux2Pipeline", pairs(comfy(FLUX2), PEFT), IN_FLUX, marks=SINCE_037),
        ("FluxPipeline", pairs(BY_XLABS, XLABS), IN_FLUX),
        ("FluxPipeline", pairs(BY_ONETRAINER, KOHYA, alpha=1.0), IN_FLUX),
    ],
)
def test_layers_have_the_pipelines_names_and_their_own_update(tmp_path, pipeline, tensors, names):
    layers = read_adapter(saved(tensors, tmp_path), getattr(diffusers, pipeline)).layers
    downs, ups = (
        [t for key, t in tensors.items() if key.endswith(ends)] for ends in zip(PEFT, KOHYA, XLABS, strict=True)
    )
    scale = 1.0 / 4 if any(key.endswith(".alpha") for key in tensors) else 1.0
    assert layers.keys() == {f"transformer.{name}" for name in names}
    for name, a, b in zip(names, downs, ups, strict=True):
        torch.testing.assert_close(tiny.delta(layers[f"transformer.{name}"]), scale * b @ a)


def test_what_the_converter_would_drop_is_refused(tmp_path):
    of_t5 = {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (16, 16)}
    tensors = pairs(comfy(FLUX), KOHYA) | {key: 1e-4 * t for key, t in pairs(of_t5, KOHYA).items()}
    with pytest.raises(AdapterError, match="converter for FluxPipeline keeps 5 of its 6 layers"):
        read_adapter(saved(tensors, tmp_path), diffusers.FluxPipeline)


@pytest.mark.parametrize("names", [kohya, comfy])
@pytest.mark.parametrize(
    ("odd", "what"),
    [("diff_b", "a changed bias"), ("dora_scale", "DoRA under"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa")],
)
def test_what_is_no_pair_of_matrices_is_refused_by_its_kind(tmp_path, names, odd, what):
    (layer,) = names({"double_blocks.0.img_attn.proj": (WIDTH, WIDTH)})
    tensors = pairs(names(FLUX), KOHYA, alpha=2.0) | {f"{layer}.{odd}": torch.ones(WIDTH)}
    with pytest.raises(AdapterError, match=rf"{odd}': {what}.* can't be read; it would be lost"):
        read_adapter(saved(tensors, tmp_path), diffusers.FluxPipeline)


@pytest.mark.parametrize(
    ("layer", "whose"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", "ComfyUI's own names"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "kohya's names of Flux"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", "OneTrainer's names"),
    ],
)
def test_without_a_pipeline_it_is_told_whose_names_they_are_and_what_to_do(tmp_path, layer, whose):
    file = saved(pairs({layer: (16, 16)}, KOHYA), tmp_path)
    with pytest.raises(AdapterError, match=rf"{whose}.* can be read only for a pipeline: .*pipeline=CLASS"):
        read_adapter(file)
    with pytest.raises(AdapterError, match=rf"{whose}.* can't be read for StableDiffusionPipeline"):
        read_adapter(file, diffusers.StableDiffusionPipeline)


def test_names_that_diffusers_has_no_converter_for_are_told(tmp_path):
    file = saved(pairs(kohya({"joint_blocks.0.x_block.attn.qkv": (8, 24)}), KOHYA, alpha=1.0), tmp_path)
    with pytest.raises(AdapterError, match="Stable Diffusion 3 can't be read for StableDiffusion3Pipeline"):
        read_adapter(file, diffusers.StableDiffusion3Pipeline)
    wrong = saved(pairs(kohya({"double_blocks.0.img_attn.what": (8, 8)}), KOHYA, alpha=1.0), tmp_path)
    with pytest.raises(AdapterError, match=r"diffusers can't convert it for FluxPipeline: .*img_attn_what"):
        read_adapter(wrong, diffusers.FluxPipeline)


def test_a_file_for_another_pipeline_is_refused_by_its_own_names(tmp_path):
    for layers in (WAN, FLUX):
        file = saved(pairs(comfy(layers), PEFT), tmp_path)
        pipeline = diffusers.StableDiffusion3Pipeline if layers is FLUX else diffusers.FluxPipeline
        with pytest.raises(
            AdapterError, match=rf"'diffusion_model\..*lora_A\.weight': .*be read for {pipeline.__name__}"
        ):
            read_adapter(file, pipeline)


def test_commands_read_it_for_their_pipeline(flux, tmp_path):
    file = saved(pairs(kohya(FLUX), KOHYA, alpha=2.0), tmp_path)
    words = [f"adapter={file}", "to=diffusers", f"out={tmp_path / 'ours'}"]
    with pytest.raises(ModelError, match="FluxPipe is no class of pipelines"):
        export(configure("export", [*words, "pipeline=FluxPipe"]))
    written = export(configure("export", [*words, "pipeline=FluxPipeline"]))
    assert read_adapter(written).equals(read_adapter(file, diffusers.FluxPipeline))

    flux.save_pretrained(tmp_path / "flux")
    drawing = ["prompt=[a bird]", f"model.name={tmp_path / 'flux'}", "steps=2", "size=16"]
    one, other = (
        generate(configure("generate", [*drawing, f"adapter={source}"]), tmp_path / f"drawn_{i}")[0].image
        for i, source in enumerate((file, written))
    )
    assert one.tobytes() == other.tobytes()
