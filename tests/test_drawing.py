"""Pictures drawn by a pipeline."""

import diffusers
import numpy as np
import pytest
import tiny_diffusion as tiny
import torch

from vislora.drawing import Sampling, draw
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
    (image,) = draw(pipe, [("a bird", 0)], Sampling(steps=2, guidance=3.0, size=16))
    assert image.size == (16, 16)


def test_pipeline_that_wants_a_picture_besides_says_so(tmp_path):
    sd = tiny.stable_diffusion(tmp_path)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **sd.components, controlnet=diffusers.ControlNetModel.from_unet(sd.unet), requires_safety_checker=False
    )
    with pytest.raises(ConfigError, match="StableDiffusionControlNetPipeline can't draw that: image must be passed"):
        draw(pipe, [("a bird", 0)], Sampling(steps=2, guidance=3.0, size=16))
