"""Pictures drawn by a pipeline."""

import numpy as np
import tiny_diffusion as tiny
import torch

from vislora.drawing import Sampling, draw


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
