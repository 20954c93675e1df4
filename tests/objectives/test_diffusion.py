"""What a step learns from is a function of each sample's seed; validation never changes."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from vislora.objectives.diffusion import VALIDATION_LEVELS, Diffusion
from vislora.objectives.schedules import schedule

EMPTY = {"prompt_embeds": torch.full((1, 3, 4), -1.0)}


class Recorder(nn.Module):
    """Keeps what it was called with; predicts zero."""

    def forward(self, latents, timesteps, text):
        self.latents, self.timesteps, self.text = latents, timesteps, text
        return torch.zeros_like(latents)


def objective(prediction="epsilon", **settings):
    return Diffusion(schedule(DDPMScheduler(prediction_type=prediction)), EMPTY, **settings)


def batch(count, first_seed=0):
    draws = torch.Generator().manual_seed(7)
    return {
        "latents": torch.randn(count, 4, 8, 8, generator=draws),
        "seed": torch.arange(first_seed, first_seed + count) * 7919 + 1,
        "weight": torch.ones(count),
        "text": {"prompt_embeds": torch.randn(count, 3, 4, generator=draws), "time_ids": torch.ones(count, 6)},
    }


def part(whole, rows):
    text = {name: value[rows] for name, value in whole["text"].items()}
    return {name: value[rows] for name, value in whole.items() if name != "text"} | {"text": text}


def test_a_samples_loss_is_the_same_in_any_batch_and_whatever_was_drawn_before():
    loss = objective(caption_dropout=0.5, noise_offset=0.2, min_snr_gamma=5.0)
    whole = loss.losses(Recorder(), batch(8))
    torch.manual_seed(99)
    rows = torch.tensor([5, 2])
    torch.testing.assert_close(loss.losses(Recorder(), part(batch(8), rows)), whole[rows], rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_the_loss_is_the_weighted_mean_square_of_what_was_not_predicted(gamma):
    given, model = batch(4), Recorder()
    given["weight"] = torch.tensor([1.0, 0.0, 2.0, 0.5])
    losses = objective(min_snr_gamma=gamma).losses(model, given)
    share = DDPMScheduler().alphas_cumprod[model.timesteps]
    alphas = share[:, None, None, None]
    noise = (model.latents - alphas.sqrt() * given["latents"]) / (1 - alphas).sqrt()
    min_snr = 1.0 if gamma is None else (gamma * (1 - share) / share).clamp(max=1.0)
    torch.testing.assert_close(losses, min_snr * given["weight"] * noise.square().mean((1, 2, 3)))
    assert gamma is None or len(min_snr.unique()) > 2


def test_noise_is_standard_and_levels_are_uniform():
    given, model = batch(2000), Recorder()
    objective().losses(model, given | {"latents": torch.zeros(2000, 4, 8, 8)})
    times = model.timesteps.double() / 1000
    assert times.mean() == pytest.approx(0.5, abs=0.02)
    assert times.var() == pytest.approx(1 / 12, abs=0.005)
    noise = model.latents / (1 - DDPMScheduler().alphas_cumprod[model.timesteps]).sqrt()[:, None, None, None]
    assert noise.mean() == pytest.approx(0.0, abs=0.01)
    assert noise.std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_multiplies_the_odds_of_the_levels_and_leaves_validation_alone(shift):
    def levels(**settings):
        model = Recorder()
        objective(**settings).losses(model, batch(500))
        return (model.timesteps.double() + 0.5) / 1000

    plain, shifted = levels(), levels(timestep_shift=shift)
    inner = (plain > 0.05) & (plain < 0.95)  # away from the ends, where a thousandth is much
    odds = [(u / (1 - u))[inner] for u in (plain, shifted)]
    torch.testing.assert_close(odds[1], shift * odds[0], rtol=0.05, atol=0)
    assert (shifted > 0.5).double().mean() == pytest.approx(shift / (1 + shift), abs=0.05)
    figures = [objective(timestep_shift=s).validate(Recorder(), [batch(4)], Accelerator()) for s in (1.0, shift)]
    assert figures[0] == figures[1]


def test_an_offset_is_shared_by_the_pixels_of_a_channel_and_adds_its_variance():
    given, model = batch(1500), Recorder()
    objective(noise_offset=0.5).losses(model, given | {"latents": torch.zeros(1500, 4, 8, 8)})
    noise = model.latents / (1 - DDPMScheduler().alphas_cumprod[model.timesteps]).sqrt()[:, None, None, None]
    variance = (0.5**2 + 1 / 64) * torch.eye(4)  # each channel has its own
    torch.testing.assert_close(noise.mean((2, 3)).T.cov(), variance, rtol=0.1, atol=0.03)


def test_the_share_of_captions_that_is_dropped_is_replaced_by_the_empty_one_and_nothing_else_is():
    given, model = batch(1000), Recorder()
    objective(caption_dropout=0.3).losses(model, given)
    dropped = (model.text["prompt_embeds"] == -1.0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(model.text["dropped"], dropped)
    assert torch.equal(model.text["prompt_embeds"][~dropped], given["text"]["prompt_embeds"][~dropped])
    assert torch.equal(model.text["time_ids"], given["text"]["time_ids"])
    objective().losses(model, given)
    assert torch.equal(model.text["prompt_embeds"], given["text"]["prompt_embeds"])


def test_validation_is_the_same_at_any_time_and_in_any_batches():
    model, accelerator = Recorder(), Accelerator(cpu=True)
    one = objective(caption_dropout=0.9, min_snr_gamma=1.0).validate(model, [batch(6)], accelerator)
    torch.manual_seed(5)
    parts = [part(batch(6), torch.arange(4)), part(batch(6), torch.arange(4, 6))]
    assert objective().validate(model, parts, accelerator)["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)
    assert one["val_loss"] == pytest.approx(1.0, abs=0.1)  # nothing was predicted of noise with variance 1
    assert model.timesteps[0] == VALIDATION_LEVELS[-1] * 1000


def test_each_level_of_validation_has_noise_of_its_own():
    seen = []

    class Notes(Recorder):
        def forward(self, latents, timesteps, text):
            share = DDPMScheduler().alphas_cumprod[timesteps][:, None, None, None]
            seen.append(latents / (1 - share).sqrt())
            return super().forward(latents, timesteps, text)

    objective().validate(Notes(), [batch(8) | {"latents": torch.zeros(8, 4, 8, 8)}], Accelerator(cpu=True))
    alike = torch.corrcoef(torch.stack([noise.flatten() for noise in seen]))
    torch.testing.assert_close(alike, torch.eye(len(VALIDATION_LEVELS)), rtol=0, atol=0.1)


def test_less_is_better():
    assert not objective().higher_is_better
