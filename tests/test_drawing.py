"""Pictures drawn by a pipeline."""

import diffusers
import numpy as np
import pytest
import tiny_diffusion as tiny
import torch

from vislora.drawing import Sampling, check_steps, draw
from vislora.errors import ConfigError


def test_pictures_drawn_together_are_decoded_one_at_a_time(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    jobs, sampling = [("a cat", 0), ("a dog", 1), ("a bird", 2)], Sampling(steps=2, guidance=3.0)
    denoised, decoded = [], []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: denoised.append(len(args[0])), with_kwargs=True)
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    images = draw(pipe, jobs, sampling)
    assert (denoised, decoded) == ([6, 6], [1, 1, 1])
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    whole = pipe([prompt for prompt, _ in jobs], num_inference_steps=2, guidance_scale=3.0, generator=generators)
    assert decoded[3:] == [3]  # afterwards it decodes as it did
    for one, other in zip(images, whole.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_pipeline_without_an_autoencoder_draws(tmp_path):  # DeepFloyd's IF, which draws in pixels
    denoiser = tiny.unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=tiny.WIDTH,
        encoder_hid_dim_type="text_proj",
    )
    pipe = diffusers.IFPipeline(
        tokenizer=tiny.tokenizer(tmp_path),
        text_encoder=tiny.t5(),
        unet=denoiser,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    (image,) = draw(pipe, [("a bird", 0)], Sampling(steps=2, guidance=3.0, size=(16, 16)))
    assert image.size == (16, 16)


OLD_NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of some schedulers


@OLD_NUMPY
@pytest.mark.parametrize(
    ("scheduler", "settings", "steps"),
    [
        (diffusers.DDIMScheduler, {"steps_offset": 1}, 1000),  # raises IndexError
        (diffusers.LCMScheduler, {}, 60),  # ValueError
        (diffusers.EulerAncestralDiscreteScheduler, {"prediction_type": "sample"}, 2),  # NotImplementedError
    ],
)
def test_what_a_scheduler_cant_draw_is_told_before_and_as_it_draws(tmp_path, scheduler, settings, steps):
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ConfigError, match=rf"^steps={steps}: {scheduler.__name__}, of 1000 times, can't draw so: "):
        check_steps(pipe.scheduler, steps, "steps")
    pipe.unet.forward = lambda sample, *_, **__: (sample,)
    with pytest.raises(ConfigError, match=r"^StableDiffusionPipeline can't draw that: "):
        draw(pipe, [("a", 0)], Sampling(steps, 1.0, (16, 16)))


@OLD_NUMPY
@pytest.mark.parametrize("name", ["DDPM", "PNDM", "EulerAncestralDiscrete", "HeunDiscrete", "UniPCMultistep", "LCM"])
def test_what_a_scheduler_can_draw_is_not_refused_and_draws_no_number(tmp_path, name):
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    before, made_for = torch.get_rng_state(), pipe.scheduler.num_inference_steps
    for steps in (4, 25):
        check_steps(pipe.scheduler, steps, "steps")
    assert torch.equal(torch.get_rng_state(), before)
    assert pipe.scheduler.num_inference_steps == made_for  # another one was tried
    check_steps(tiny.flux(tmp_path / "flux").scheduler, 25, "steps")


def test_pipeline_that_wants_a_picture_besides_says_so(tmp_path):
    sd = tiny.stable_diffusion(tmp_path)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **sd.components, controlnet=diffusers.ControlNetModel.from_unet(sd.unet), requires_safety_checker=False
    )
    with pytest.raises(ConfigError, match="StableDiffusionControlNetPipeline can't draw that: image must be passed"):
        draw(pipe, [("a bird", 0)], Sampling(steps=2, guidance=3.0, size=(16, 16)))
