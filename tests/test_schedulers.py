"""The schedulers on a toy network: pinned values, and what each has to hold."""

import pytest
import torch

from minisd.noise import NoiseSchedule, Original
from minisd.schedulers import ddim, ddpm

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_DDIM = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def toy(x, t):
    return 0.5 * x.tanh() + 0.1 * t / 1000


def start():
    return torch.tensor([-1.0, -0.25, 0.5, 2.0]).view(1, 4, 1, 1)


def last(iterator):
    *_, x = iterator
    return x


# Reference values of an independent float64 implementation.
@pytest.mark.parametrize(
    "schedule, settings, n10, n20",
    [
        ({}, {}, (-5.378889, -0.968339, 1.180695, 12.176441), (-6.98776, -1.161922, 1.393817, 15.8723)),
        (
            {},
            {"timestep_spacing": "trailing"},
            (-9.491666, -1.675494, 1.783796, 20.892033),
            (-9.321464, -1.530894, 1.718029, 20.892481),
        ),
        (
            {"prediction_type": "v_prediction"},
            {},
            (-0.506098, -0.138317, 0.178923, 1.104075),
            (-0.539509, -0.145975, 0.194794, 1.181338),
        ),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"timestep_spacing": "trailing"},
            (-0.475391, -0.132988, 0.159544, 1.031768),
            (-0.516665, -0.141757, 0.180694, 1.129786),
        ),
    ],
    ids=["leading", "trailing", "v", "v zero snr"],
)
def test_ddim_golden(schedule, settings, n10, n20):
    for steps, expected in [(10, n10), (20, n20)]:
        x = last(ddim.sample(toy, start(), NoiseSchedule(**SD, **schedule), steps, [], **SD_DDIM | settings))
        assert torch.allclose(x.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_constants_of_sd():
    schedule = NoiseSchedule(**SD)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.99914998, abs=1e-7)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.00466010, abs=1e-7)
    snr = schedule.snr(torch.tensor([0, 999]))
    assert snr[0].item() == pytest.approx(1175.44, rel=1e-4)
    assert snr[1].item() == pytest.approx(0.0046819, rel=1e-4)


def test_timesteps():
    schedule = NoiseSchedule(**SD)
    assert schedule.timesteps(10, "leading", 1) == list(range(901, 0, -100))
    assert schedule.timesteps(10, "trailing", 0) == list(range(999, 0, -100))
    assert schedule.timesteps(10, "linspace", 0) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    with pytest.raises(ValueError, match="steps 1001"):
        schedule.timesteps(1001, "leading", 0)


def test_zero_snr_cannot_predict_noise():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule(**SD, rescale_betas_zero_snr=True)


def test_ddpm_posterior_variance():
    """With 10 steps, the jump from 900 leaves this much noise: sigma^2 = 0.6019844."""
    schedule = NoiseSchedule(**SD)
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]
    steps = ddpm.sample(lambda x, t: x * 0, torch.zeros(2000, 4, 1, 1), schedule, 10, generators)
    variance = next(iter(steps)).var().item()
    assert variance == pytest.approx(0.6019844, rel=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_and_prediction_agree(prediction_type):
    schedule = NoiseSchedule(**SD, prediction_type=prediction_type)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for t in (0, 500, 999):
        timesteps = torch.full((3,), t)
        x = schedule.add_noise(latents, noise, timesteps)
        pred = schedule.target(latents, noise, timesteps)
        alpha = schedule.alphas_cumprod[t]
        denoised = schedule.denoised(pred, x, alpha)
        assert torch.allclose(denoised, latents, atol=2e-3)
        assert torch.allclose(schedule.noise_in(denoised, pred, x, alpha), noise, atol=2e-3)


def test_low_precision_latents_get_an_exact_schedule():
    """In bf16, sqrt(1 - alpha_bar_0) would round to nothing."""
    schedule = NoiseSchedule(**SD)
    zeros, noise = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    x = schedule.add_noise(zeros, noise, torch.tensor([0]))
    assert x.dtype == torch.float32
    assert x.item() == pytest.approx((1 - 0.99914998) ** 0.5, rel=1e-4)


def test_original_must_leave_a_step():
    original = Original(latents=torch.zeros(1, 4, 1, 1), start=10)
    with pytest.raises(ValueError, match="--strength leaves none of the 10 steps"):
        last(ddim.sample(toy, start(), NoiseSchedule(**SD), 10, [], original=original))
