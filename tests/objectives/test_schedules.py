"""Noise is mixed in, and targets are made, as diffusers' schedulers do it; min-SNR weights as the paper has them."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from vislora.errors import ModelError
from vislora.objectives.schedules import Discrete, schedule

LATENTS, NOISE = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LEVELS = torch.tensor([0.0, 0.2501, 0.5, 0.75, 0.9999])


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_and_targets_are_those_of_diffusers(kind):
    peer = DDPMScheduler(beta_schedule=kind)
    timesteps = torch.tensor([0, 250, 500, 750, 999])
    targets = {
        "epsilon": NOISE,
        "sample": LATENTS,
        "v_prediction": peer.get_velocity(LATENTS, NOISE, timesteps),
    }
    for prediction, target in targets.items():
        mine = schedule(DDIMScheduler(beta_schedule=kind, prediction_type=prediction, steps_offset=1))
        noised = mine.noise(LATENTS, NOISE, LEVELS, None)
        assert torch.equal(noised.timesteps, timesteps)
        torch.testing.assert_close(noised.latents, peer.add_noise(LATENTS, NOISE, timesteps))
        torch.testing.assert_close(noised.target, target)
        assert torch.equal(noised.weight, torch.ones(5))


def test_the_schedule_of_a_sampler_is_that_of_its_training():
    mine = schedule(EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"))
    torch.testing.assert_close(mine.alphas_cumprod, DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
    assert mine.prediction == "v_prediction"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_latents_by_the_capped_ratio(prediction):
    alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    noised = Discrete(alphas, prediction).noise(LATENTS, NOISE, LEVELS, 5.0)
    a = alphas[noised.timesteps].double().sqrt()[:, None, None, None]
    s = (1 - alphas[noised.timesteps].double()).sqrt()[:, None, None, None]
    predicted = noised.target.double() + 0.1 * torch.randn(5, 4, 8, 8, dtype=torch.float64)
    # the clean latents that a prediction stands for
    clean = {
        "epsilon": (noised.latents - s * predicted) / a,
        "v_prediction": a * noised.latents - s * predicted,
        "sample": predicted,
    }[prediction]
    snr = (a / s).square().flatten()
    expected = snr.clamp(max=5.0) * (clean - LATENTS.double()).square().mean((1, 2, 3))
    found = noised.weight * (predicted - noised.target).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


def test_min_snr_is_finite_where_nothing_but_noise_is_left():
    alphas = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    weight = Discrete(alphas, "v_prediction").noise(LATENTS, NOISE, torch.full((5,), 0.9999), 5.0).weight
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("shift", [1.0, 3.1, 100.0])
def test_the_largest_level_is_the_last_timestep_however_it_is_shifted(shift):
    largest = torch.nextafter(torch.ones(5), torch.zeros(5))
    noised = schedule(DDPMScheduler()).noise(LATENTS, NOISE, largest, None, shift)
    assert noised.timesteps.tolist() == [999] * 5


def test_a_flow_is_mixed_as_diffusers_scales_noise():
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noised = schedule(peer).noise(LATENTS, NOISE, LEVELS, None)
    sigmas = (noised.timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(noised.latents, sigmas * NOISE + (1 - sigmas) * LATENTS)
    # one Euler step from the noisy latents with the right prediction ends at the clean ones
    torch.testing.assert_close(noised.latents - sigmas * noised.target, LATENTS, rtol=1e-4, atol=1e-5)


def test_levels_of_a_flow_are_logit_normal_and_shifted():
    levels = torch.linspace(0, 1, 20_001)[:-1]
    zeros = torch.zeros(len(levels), 1, 1, 1)
    plain, moved = (
        schedule(FlowMatchEulerDiscreteScheduler(shift=s)).noise(zeros, zeros, levels, None).timesteps / 1000
        for s in (1.0, 3.0)
    )
    logits = torch.logit(plain[1:].double())
    assert logits.mean() == pytest.approx(0.0, abs=0.01)
    assert logits.std() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


def test_a_shift_of_the_training_multiplies_the_schedulers_own():
    whole, parts = (
        schedule(FlowMatchEulerDiscreteScheduler(shift=own)).noise(LATENTS, NOISE, LEVELS, None, shift)
        for own, shift in ((6.0, 1.0), (3.0, 2.0))
    )
    torch.testing.assert_close(parts.timesteps, whole.timesteps)
    torch.testing.assert_close(parts.latents, whole.latents)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (128, 128), (96, 160)])
def test_a_shift_that_grows_with_the_picture_is_the_one_that_diffusers_samples_with(kind, height, width):
    sizes = {"base_image_seq_len": 200, "max_image_seq_len": 4000, "base_shift": 0.4, "max_shift": 1.2}
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind, **sizes)
    zeros = torch.zeros(5, 1, height, width)
    plain, moved = (
        schedule(scheduler).noise(zeros, zeros, LEVELS, None).timesteps / 1000
        for scheduler in (FlowMatchEulerDiscreteScheduler(shift=1.0), peer)
    )
    packed = FluxPipeline._pack_latents(zeros, 5, 1, height, width)
    peer.set_timesteps(sigmas=plain.tolist(), mu=calculate_shift(packed.shape[1], *sizes.values()))
    torch.testing.assert_close(moved, peer.sigmas[:-1])


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ModelError, match="prediction_type is 'velocity': expected epsilon"):
        Discrete(torch.rand(10), "velocity")


def test_continuous_timesteps_are_refused():
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    with pytest.raises(ModelError, match="EulerDiscreteScheduler with timestep_type=continuous calls its model with"):
        schedule(scheduler)
