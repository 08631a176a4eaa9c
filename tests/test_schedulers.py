"""The schedulers on a toy network: pinned values, and what each has to hold."""

import math

import pytest
import torch

from minisd import registry
from minisd.noise import NoiseSchedule, Philox, randn
from minisd.schedulers import ddim, ddpm, dpmpp_2m, dpmpp_3m_sde, euler, lcm, pndm
from minisd.schedulers._problem import InitImage
from tests.helpers import SD, drawn, seeded, toy

SD_DDIM = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def start():
    return torch.tensor([-1.0, -0.25, 0.5, 2.0]).view(1, 4, 1, 1)


LEADING = {"steps_offset": 1, "timestep_spacing": "leading"}
PLMS = LEADING | {"skip_prk_steps": True}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True}

# Reference values of an independent float64 implementation: x after the last of 10 steps, and of 20.
# fmt: off
GOLDEN = [
    (ddim, {}, SD_DDIM,
     (-5.378889, -0.968339, 1.180695, 12.176441), (-6.98776, -1.161922, 1.393817, 15.8723)),
    (ddim, {}, SD_DDIM | TRAILING,
     (-9.491666, -1.675494, 1.783796, 20.892033), (-9.321464, -1.530894, 1.718029, 20.892481)),
    (ddim, V, SD_DDIM,
     (-0.506098, -0.138317, 0.178923, 1.104075), (-0.539509, -0.145975, 0.194794, 1.181338)),
    (ddim, V | ZERO_SNR, SD_DDIM | TRAILING,
     (-0.475391, -0.132988, 0.159544, 1.031768), (-0.516665, -0.141757, 0.180694, 1.129786)),
    (pndm, {}, PLMS,
     (-5.172672, -0.831458, 1.118407, 12.182557), (-6.850657, -1.066759, 1.348524, 15.874887)),
    (euler, {}, {},
     (-9.487438, -1.690818, 1.775889, 20.819242), (-9.28974, -1.521909, 1.699694, 20.819267)),
    (euler, {}, LEADING,
     (-5.366597, -0.957819, 1.169102, 12.167034), (-6.976151, -1.150414, 1.381499, 15.864465)),
    (euler, {}, KARRAS,
     (-9.431177, -1.69087, 1.77494, 20.803143), (-9.260192, -1.522452, 1.698757, 20.810955)),
    (euler, {}, KARRAS | LEADING,
     (-5.363622, -0.973178, 1.176014, 12.16026), (-6.962276, -1.154679, 1.382807, 15.859118)),
    (dpmpp_2m, {}, {},
     (-9.28252, -1.442097, 1.669864, 20.900352), (-9.173694, -1.394408, 1.646496, 20.893856)),
    (dpmpp_2m, {}, LEADING,
     (-5.24695, -0.855436, 1.122438, 12.177313), (-6.491793, -1.016085, 1.291301, 15.025564)),
    (dpmpp_2m, {}, KARRAS,
     (-9.144179, -1.316287, 1.613565, 20.901785), (-9.13624, -1.368139, 1.634109, 20.893156)),
    (dpmpp_2m, V, {},
     (-0.535083, -0.143766, 0.193701, 1.182852), (-0.556012, -0.148755, 0.203551, 1.229186)),
]
# fmt: on


@pytest.mark.parametrize("scheduler, schedule, settings, n10, n20", GOLDEN)
def test_golden(scheduler, schedule, settings, n10, n20):
    for steps, expected in [(10, n10), (20, n20)]:
        x = drawn(scheduler, steps, start(), schedule=NoiseSchedule(**SD, **schedule), **settings)[-1]
        assert torch.allclose(x.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler, settings, expected",
    [
        (euler, {}, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        (euler, KARRAS, [999, 916.284, 815.045, 687.153, 523.199, 327.147, 145.939, 40.857, 6.732, 0]),
        (pndm, PLMS, [901, 801, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        (pndm, LEADING, [901, 851, 851, 801, 801, 751, 751, 701, 701, 651, 651, 601, *range(601, 0, -100)]),
        (dpmpp_2m, {}, [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]),
        (dpmpp_2m, LEADING, [901, 811, 721, 631, 541, 451, 361, 271, 181, 91]),
        (dpmpp_2m, KARRAS, [999, 916, 815, 687, 523, 327, 146, 41, 7, 0]),
        (lcm, {}, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_timesteps_seen_by_the_network(scheduler, settings, expected):
    seen = []

    def denoise(x, t):
        seen.append(t)
        return toy(x, t)

    drawn(scheduler, 10, start(), seeded(0), denoise, **settings)
    assert seen == pytest.approx(expected, abs=1e-3)


def test_constants_of_sd():
    schedule = NoiseSchedule(**SD)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.99914998, abs=1e-7)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.00466010, abs=1e-7)
    snr = schedule.snr(torch.tensor([0, 999]))
    assert snr[0].item() == pytest.approx(1175.44, rel=1e-4)
    assert snr[1].item() == pytest.approx(0.0046819, rel=1e-4)


def test_inference_timesteps():
    find = NoiseSchedule(**SD).inference_timesteps
    assert find(10, "leading", 1).tolist() == list(range(901, 0, -100))
    assert find(10, "trailing", 0).tolist() == list(range(999, 0, -100))
    assert find(10, "linspace", 0).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    with pytest.raises(ValueError, match="steps 1001"):
        find(1001, "leading", 0)


def test_zero_snr_cannot_predict_noise():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule(**SD, rescale_betas_zero_snr=True)


def test_a_schedule_of_an_unknown_kind_is_refused():
    for kind in ({"beta_schedule": "square"}, {"prediction_type": "noise"}):
        with pytest.raises(ValueError, match=f"{[*kind][0]} '.*': one of"):
            NoiseSchedule(**kind)
    with pytest.raises(ValueError, match="timestep_spacing 'even': one of"):
        NoiseSchedule().inference_timesteps(5, "even", 0)


def test_ddpm_posterior_variance():
    """With 10 steps, the jump from 900 leaves this much noise: sigma^2 = 0.6019844."""
    first = drawn(ddpm, 10, torch.zeros(2000, 4, 1, 1), seeded(*range(2000)), lambda x, t: x * 0)[0]
    variance = first.var().item()
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
        denoised, noise_in_x = schedule.split(pred, x, alpha)
        assert torch.allclose(denoised, latents, atol=2e-3)
        assert torch.allclose(noise_in_x, noise, atol=2e-3)


def test_low_precision_latents_get_an_exact_schedule():
    """In bf16, sqrt(1 - alpha_bar_0) would round to nothing."""
    schedule = NoiseSchedule(**SD)
    zeros, noise = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    x = schedule.add_noise(zeros, noise, torch.tensor([0]))
    assert x.dtype == torch.float32
    assert x.item() == pytest.approx((1 - 0.99914998) ** 0.5, rel=1e-4)


def test_an_initial_image_must_leave_a_step():
    init_image = InitImage(latents=torch.zeros(1, 4, 1, 1), first_step=10)
    with pytest.raises(ValueError, match="--strength leaves none of the 10 steps"):
        drawn(ddim, 10, start(), init_image=init_image)


@pytest.mark.parametrize("name", registry.names("schedulers"))
@pytest.mark.parametrize("levels", ["uniform", "karras", "exponential", "sgm_uniform"])
def test_noise_depends_on_the_seed_alone(name, levels):
    """A sample of a batch is what it is alone, and what is random comes from its generator only."""
    scheduler = registry.load("schedulers", name)

    def draw(*seeds):
        generators = seeded(*seeds)
        settings = {"clip_sample": False, "schedule_type": levels}
        return drawn(scheduler, 6, randn((4, 2, 2), generators), generators, **settings)[-1]

    together = draw(1, 2, 3)
    assert torch.equal(together[1:2], draw(2))
    torch.manual_seed(9)
    assert torch.equal(together, draw(1, 2, 3))
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(
    "name, has",
    [
        ("ddim", False),
        ("ddpm", True),
        ("pndm", False),
        ("euler", False),
        ("euler_ancestral", True),
        ("dpmpp_2m", False),
        ("dpmpp_2m_sde", True),
        ("dpmpp_3m_sde", True),
        ("dpmpp_sde", True),
        ("heun", False),
        ("unipc", False),
        ("lcm", True),
    ],
)
def test_who_adds_noise(name, has):
    """Those that add none need no generator; the others make two pictures of one x."""
    scheduler = registry.load("schedulers", name)

    def draw(*seeds):
        return drawn(scheduler, 6, torch.ones(1, 4, 2, 2), seeded(*seeds))[-1]

    assert torch.equal(draw(1), draw(2)) != has
    if not has:
        draw()


def test_runge_kutta_needs_four_steps():
    init = InitImage(latents=torch.ones(1, 4, 2, 2), first_step=5)
    for steps, image, left in ((3, None, 3), (8, init, 3)):
        with pytest.raises(ValueError, match=f"--steps: pndm .* 4 or more, and {left} are left"):
            drawn(pndm, steps, torch.ones(1, 4, 2, 2), init_image=image)
    assert len(drawn(pndm, 4, torch.ones(1, 4, 2, 2))) == 4
    assert len(drawn(pndm, 9, torch.ones(1, 4, 2, 2), init_image=init)) == 4


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"])
def test_ancestral_noise_keeps_the_level(name):
    """Where the network knows that x_0 is 0, x is noise of the level's size after every step, with new noise
    and without; and with new noise it forgets what it began with."""
    schedule, n = NoiseSchedule(**SD), 20000
    scheduler = registry.load("schedulers", name)

    def nothing_there(x, t):  # the noise in x; the sigma schedulers scale x so that this too is one
        bar = schedule.alphas_cumprod.double()
        low = min(int(t), 998)
        sigma = ((1 - bar) / bar).sqrt()[low : low + 2]
        sigma = sigma[0] + (t - low) * (sigma[1] - sigma[0])
        return (x * (sigma**2 + 1).sqrt() / sigma).float()

    for eta in (0.0, 1.0):
        generators = seeded(0)
        x = randn((n,), generators)
        states = drawn(scheduler, 6, x, generators, nothing_there, eta=eta)[:-1]
        like = [torch.corrcoef(torch.stack([x[0], state[0]]))[0, 1].item() for state in states]
        if eta == 0:
            assert min(like) > 0.999
        else:
            assert like == sorted(like, reverse=True) and like[-1] < 0.1
        sizes = [state.std().item() for state in states]
        assert sizes == sorted(sizes, reverse=True)


def test_the_noise_of_a_gpu():
    """The numbers that A1111 has published for seed 0."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]  # fmt: skip
    generator = Philox(0)
    assert torch.allclose(generator.randn((3, 4)), torch.tensor(expected), rtol=0, atol=1e-6)
    again = torch.cat([generator.randn((100, 100)), Philox(2**32).randn((100, 100))])
    assert abs(again.mean()) < 0.02 and again.std() == pytest.approx(1, abs=0.02)
    parts = torch.stack([*again.chunk(2), Philox(0).randn((100, 100))]).flatten(1)
    assert (torch.corrcoef(parts) - torch.eye(3)).abs().max() < 0.05  # other draws, and the seed's upper half
    assert torch.equal(randn((2, 3), [Philox(3), Philox(4)])[1], Philox(4).randn((2, 3)))


def test_third_order_sde_equals_k_diffusion():
    """The formulas of its sample_dpmpp_3m_sde, for x = x_0 + sigma noise, on our levels and noise."""
    schedule, n, eta = NoiseSchedule(**SD), 8, 0.6
    table = ((1 - schedule.alphas_cumprod.double()) / schedule.alphas_cumprod).sqrt()
    sigmas = [math.exp(math.log(table[-1]) + i / (n - 1) * math.log(table[0] / table[-1])) for i in range(n)]
    generators, own, denoised, h = seeded(7), seeded(7), {}, {}
    x = randn((4, 3, 3), generators).double() * math.hypot(sigmas[0], 1)  # theirs begins with sigma times it
    got = drawn(
        dpmpp_3m_sde, n, randn((4, 3, 3), own), own, lambda x, t: x.tanh(),
        schedule_type="exponential", eta=eta,
    )  # fmt: skip
    for i, (sigma, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        denoised[i] = x - sigma * (x / math.hypot(sigma, 1)).tanh()
        if after == 0:
            x = denoised[i]
        else:
            h[i] = math.log(sigma / after)
            wide = h[i] * (eta + 1)
            x = math.exp(-wide) * x - math.expm1(-wide) * denoised[i]
            phi_2 = math.expm1(-wide) / wide + 1
            if i == 1:
                x = x + phi_2 * (denoised[1] - denoised[0]) / (h[0] / h[1])
            if i >= 2:
                r0, r1 = h[i - 1] / h[i], h[i - 2] / h[i]
                d1_0, d1_1 = (denoised[i] - denoised[i - 1]) / r0, (denoised[i - 1] - denoised[i - 2]) / r1
                d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / wide - 0.5) * d2
            x = x + randn((4, 3, 3), generators) * after * math.sqrt(-math.expm1(-2 * h[i] * eta))
        assert (got[i] * math.hypot(after, 1) - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_sgm_uniform(name):
    """Timesteps that divide those of training evenly, whatever the spacing in the model's file: the first is
    the last of training, and the last one a step above 0."""
    seen = []
    scheduler = registry.load("schedulers", name)
    drawn(scheduler, 4, start(), seeded(0), lambda x, t: seen.append(t) or x, schedule_type="sgm_uniform",
          **LEADING)  # fmt: skip
    exact = [999, 749.25, 499.5, 249.75]
    assert seen == (exact if name == "euler" else [999, 749, 500, 250])


@pytest.mark.parametrize(
    "name, found",
    [
        ("Euler a", "euler_ancestral"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++ 2m sde", "dpmpp_2m_sde"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("UniPC", "unipc"),
        ("Heun", "heun"),
        ("UniPCMultistepScheduler", "unipc"),
        ("PLMS", "pndm"),
        ("LCM", "lcm"),
        ("DDIM", "ddim"),
        ("Euler-Ancestral", "euler_ancestral"),
        ("euler", "euler"),
    ],
)
def test_names(name, found):
    assert registry.find("schedulers", name) == found


def test_a1111_names_are_different():
    names = [registry.load("schedulers", name).A1111 for name in registry.names("schedulers")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name, message",
    [
        ("eulr", "did you mean 'euler'"),
        ("dpm2m", "did you mean 'dpmpp_2m'"),
        ("quux", "unknown scheduler 'quux'; one of: ddim, ddpm, dpmpp_2m"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        registry.find("schedulers", name)


def test_lcm_has_no_more_steps_than_it_was_distilled_at():
    with pytest.raises(ValueError, match="--steps 51: lcm takes from 1 to 50"):
        drawn(lcm, 51, start())
