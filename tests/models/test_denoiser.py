"""The denoiser is given what the pipelines give their UNets, and latents are those they decode."""

import re

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor
from transformers import T5EncoderModel as T5

from vislora.config.adapter import PipelineLora
from vislora.errors import ModelError
from vislora.lora import Adapters, LoraSettings
from vislora.models.adapted import adapt_pipeline
from vislora.models.denoiser import Denoiser, cut_off, encode_images, encode_text, readers, text_encoders, tokenize
from vislora.objectives.diffusion import Diffusion
from vislora.objectives.schedules import schedule
from vislora.precision import CastOnce
from vislora.targets.diffusers import find_targets

PROMPTS = ["a blue jay", "an owl at night and some more words than there is room for"]
PIPELINES = {
    "sd": tiny.stable_diffusion,
    "sdxl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
    "flux": tiny.flux,
}


@pytest.fixture(params=PIPELINES)
def pipe(request, tmp_path):
    return PIPELINES[request.param](tmp_path / "tokenizer")


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(pipe):
    text = encode_text(pipe, tokenize(pipe, PROMPTS))
    guided = {} if isinstance(pipe, diffusers.FluxPipeline) else {"do_classifier_free_guidance": False}
    more = {f"prompt_{i}": PROMPTS for i in (2, 3) if hasattr(pipe, f"tokenizer_{i}")}
    found = pipe.encode_prompt(prompt=PROMPTS, device="cpu", num_images_per_prompt=1, **more, **guided)
    expected = [tensor for tensor in found if tensor is not None][: len(text)]
    torch.testing.assert_close(list(text.values()), expected)


@torch.no_grad()
def test_captions_are_cut_off_where_their_end_makes_no_difference(pipe):
    """Each begins with as many words of a letter; Flux and SD3 read the longer ones by T5 alone."""
    beginnings = ["a " * count for count in (3, 13, 14, 15, 40, 254, 255, 256, 510, 511, 512)]
    one, other = ([f"{words}{last}" for words in beginnings] for last in "xy")
    encoded = [encode_text(pipe, tokenize(pipe, captions)) for captions in (one, other)]
    same = [
        all(torch.equal(a[i], b[i]) for a, b in zip(*(e.values() for e in encoded), strict=True)) for i in range(11)
    ]
    assert any(same)
    assert cut_off(readers(pipe), one) == [i for i in range(11) if same[i]]


@torch.no_grad()
def test_the_prediction_is_the_one_the_pipeline_samples_with(pipe):
    component = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    seen, latents = [], torch.randn(1, 4, 8, 8)
    component.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    given, guidance = latents, 0.0
    if isinstance(pipe, diffusers.FluxPipeline):
        given, guidance = pipe._pack_latents(latents, 1, 4, 8, 8), 3.5
    pipe(
        PROMPTS[0],
        num_inference_steps=1,
        guidance_scale=guidance,
        height=16,
        width=16,
        latents=given,
        output_type="latent",
    )
    ((args, kwargs, expected),) = seen
    timestep = kwargs["timestep"].flatten() if "timestep" in kwargs else args[1].flatten()
    if isinstance(pipe, diffusers.FluxPipeline):
        timestep, expected = 1000 * timestep, pipe._unpack_latents(expected, 16, 16, pipe.vae_scale_factor)
    latents = latents * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    text = tokenize(pipe, PROMPTS[:1]) | {"time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])}
    found = Denoiser(pipe, text=True)(latents, timestep, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False], ids=["tokens", "encoded"])
@pytest.mark.parametrize(("name", "zeros"), [("sd", None), ("sdxl", True), ("sdxl", False), ("sd3", None)])
def test_dropped_captions_are_the_pipelines_own_text_for_none(name, zeros, learned, tmp_path):
    pipe = PIPELINES[name](tmp_path / "words")
    if zeros is not None:
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    more = {f"prompt_{i}": PROMPTS for i in (2, 3) if hasattr(pipe, f"tokenizer_{i}")}
    guided = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    expected = list(pipe.encode_prompt(prompt=PROMPTS, device="cpu", **guided, **more)[1::2])
    text, none = tokenize(pipe, PROMPTS), tokenize(pipe, [""])
    if not learned:
        text, none = encode_text(pipe, text), encode_text(pipe, none)
    model, seen = Denoiser(pipe, text=learned), []
    component = getattr(pipe, model.family.component)
    component.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    batch = {"latents": torch.randn(2, 4, 8, 8), "seed": torch.arange(2), "weight": torch.ones(2)}
    batch["text"] = text | {"time_ids": torch.ones(2, 6)}
    Diffusion(schedule(pipe.scheduler), none, caption_dropout=1.0).losses(model, batch)
    (given,) = seen
    found = [given["encoder_hidden_states"], given.get("pooled_projections")]
    found[1] = given["added_cond_kwargs"]["text_embeds"] if "added_cond_kwargs" in given else found[1]
    torch.testing.assert_close([tensor for tensor in found if tensor is not None], expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of Flux's RMSNorm under autocast
@pytest.mark.parametrize("learned", [True, False], ids=["tokens", "encoded"])
def test_weights_cast_once_give_the_same_bits_under_autocast(pipe, learned):
    model = Denoiser(pipe, text=learned)
    adapters = Adapters(model)
    adapters.add("style", find_targets(model, ["q", "v"]), LoraSettings(rank=2, alpha=2))
    text = tokenize(pipe, PROMPTS)
    if not learned:
        with torch.no_grad():
            text = encode_text(pipe, text)
    text["time_ids"] = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 2)
    latents, trained = torch.randn(2, 4, 8, 8), [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data += 0.1

    def computed() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(latents, torch.tensor([10.0, 500.0]), text)
        grads = torch.autograd.grad(predicted.float().square().mean(), trained, materialize_grads=True)
        return [predicted, *grads]  # zeros of a text encoder's last layers, which SDXL doesn't read

    expected = computed()
    with CastOnce(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
        found = computed()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_parameters_bear_the_names_of_the_pipelines_components(pipe):
    firsts = {name.partition(".")[0] for name, _ in Denoiser(pipe, text=True).named_parameters()}
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    assert firsts == {denoiser, *text_encoders(pipe)}
    assert {name.partition(".")[0] for name, _ in Denoiser(pipe, text=False).named_parameters()} == {denoiser}


@torch.no_grad()
@pytest.mark.parametrize("scales", [{"scaling_factor": 0.5}, {"scaling_factor": 0.5, "shift_factor": 0.3}])
def test_an_autoencoders_latents_are_shifted_and_scaled_as_it_says(scales):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **scales).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = (vae.encode(images).latent_dist.mean - scales.get("shift_factor", 0.0)) * 0.5
    torch.testing.assert_close(encode_images(vae, images), expected)


@torch.no_grad()
def test_an_autoencoders_latents_are_standardised_by_the_mean_and_deviation_of_each_channel_it_says():
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 3.0]
    size = {"block_out_channels": (8,), "norm_num_groups": 4}
    vae = AutoencoderKL(**size, scaling_factor=0.5, latents_mean=mean, latents_std=std).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_images(vae, images)
    # what StableDiffusionXLPipeline decodes
    decoded = torch.stack([latents[:, c] * std[c] / 0.5 + mean[c] for c in range(4)], 1)
    torch.testing.assert_close(decoded, vae.encode(images).latent_dist.mean)


@torch.no_grad()
def test_a_tiny_autoencoders_latents_are_taken_as_they_are():
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip # noqa: E501
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(encode_images(vae, images), vae.encode(images).latents)


def test_a_denoiser_that_wants_a_picture_too_is_refused(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    pipe.unet = tiny.unet(in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels where latents have 4, as models for inpainting"):
        Denoiser(pipe, text=False)


def test_the_refiner_of_sdxl_is_refused(tmp_path):
    pipe = tiny.stable_diffusion_xl(tmp_path / "words")
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.raises(ModelError, match="addition_embed_type=text_time, as SDXL's refiner has them"):
        Denoiser(pipe, text=False)


def test_a_pipeline_without_text_is_refused():
    pipe = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)), DDIMScheduler())  # fmt: skip # noqa: E501
    with pytest.raises(ModelError, match="DDPMPipeline can't be trained"):
        Denoiser(pipe, text=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"time_cond_proj_dim": 8},
            "is told the guidance (time_cond_proj_dim=8), as models distilled to a few steps are",
        ),
        ({"class_embed_type": "timestep"}, "wants a class beside the text (class_embed_type=timestep)"),
        ({"num_class_embeds": 4}, "wants a class beside the text (num_class_embeds=4)"),
    ],
)
def test_a_denoiser_that_is_told_more_than_text_is_refused(changes, told, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "words")
    pipe.unet = tiny.unet(**changes)
    with pytest.raises(ModelError, match=re.escape(told)):
        Denoiser(pipe, text=False)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_text_encoders_that_do_not_learn_encode_in_training_as_in_sampling(kind, tmp_path):
    pipe = PIPELINES[kind](tmp_path / "words")
    model = adapt_pipeline(pipe, PipelineLora(text_encoder=True)).model.train()
    assert (model.transformer.training, model.text_encoder.training) == (True, True)
    (t5,) = (encoder for encoder in (getattr(pipe, name) for name in text_encoders(pipe)) if isinstance(encoder, T5))
    assert t5.config.dropout_rate > 0
    tokens = torch.randint(0, 50, (2, 8))
    assert torch.equal(t5(tokens)[0], t5(tokens)[0])
