"""The schedulers on a toy network: pinned values, and diffusers' schedulers step by step."""

import pytest
import torch

from minisd import registry
from minisd.noise import NoiseSchedule, Original, randn
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


@pytest.mark.parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["ddim", "ddim eta", "ddpm", "ddpm large"])
@pytest.mark.parametrize("steps", [7, 20])
def test_equals_diffusers(spacing, prediction_type, kind, steps):
    diffusers = pytest.importorskip("diffusers")
    common = {"timestep_spacing": spacing, "clip_sample": True, "clip_sample_range": 3.0, "steps_offset": 1}
    if kind.startswith("ddim"):
        theirs = diffusers.DDIMScheduler(**SD, prediction_type=prediction_type, **common)
        step = {"eta": 0.7 if "eta" in kind else 0.0}
        ours, settings = ddim, {**common, **step}
    else:
        variance = "fixed_large" if "large" in kind else "fixed_small"
        theirs = diffusers.DDPMScheduler(
            **SD, prediction_type=prediction_type, variance_type=variance, **common
        )
        step, ours, settings = {}, ddpm, {**common, "variance_type": variance}

    def seeded():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    generators = seeded()
    x = start_x = randn((4, 3, 3), generators)
    theirs.set_timesteps(steps)
    expected = []
    for t in theirs.timesteps:
        pred = toy(x, t.item())
        x = theirs.step(pred, t, x, generator=generators, **step).prev_sample
        expected.append(x)

    generators = seeded()
    randn((4, 3, 3), generators)
    schedule = NoiseSchedule(**SD, prediction_type=prediction_type)
    got = list(ours.sample(toy, start_x, schedule, steps, generators, **settings))
    assert len(got) == len(expected) == steps
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


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


@pytest.mark.parity
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["DDIM", "DDPM"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_original_as_in_diffusers_pipelines(kind, spacing, strength, masked):
    """img2img's start and 4-channel inpainting's, which at strength 1 begins with noise alone."""
    diffusers = pytest.importorskip("diffusers")
    steps, common = 7, {"timestep_spacing": spacing, "clip_sample": False, "steps_offset": 1}
    theirs = getattr(diffusers, f"{kind}Scheduler")(**SD, **common)
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9).view(1, 1, 3, 3) % 2).float() if masked else None

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = randn((4, 3, 3), generators)
    theirs.set_timesteps(steps)
    begin = max(steps - int(steps * strength), 0)
    timesteps = theirs.timesteps[begin * theirs.order :]
    if masked and strength == 1:
        x = noise * theirs.init_noise_sigma
    else:
        x = theirs.add_noise(latents, noise, timesteps[:1])
    expected = []
    for i, t in enumerate(timesteps):
        x = theirs.step(toy(x, t.item()), t, x, generator=generators).prev_sample
        if masked:
            known = latents
            if i + 1 < len(timesteps):
                known = theirs.add_noise(latents, noise, timesteps[i + 1 : i + 2])
            x = (1 - mask) * known + mask * x
        expected.append(x)

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    x = randn((4, 3, 3), generators)
    original = Original(latents=latents, start=begin, mask=mask)
    ours = registry.load("schedulers", kind.lower()).sample
    got = list(ours(toy, x, NoiseSchedule(**SD), steps, generators, original=original, **common))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_original_must_leave_a_step():
    original = Original(latents=torch.zeros(1, 4, 1, 1), start=10)
    with pytest.raises(ValueError, match="--strength leaves none of the 10 steps"):
        last(ddim.sample(toy, start(), NoiseSchedule(**SD), 10, [], original=original))
