"""Every scheduler, step by step, against diffusers' as its pipelines run them, on a toy network."""

import importlib
import inspect
import math
import sys
import types

import pytest
import torch

from minisd import registry
from minisd.formats import config_json
from minisd.noise import NoiseSchedule, randn
from minisd.schedulers._problem import InitImage
from tests.helpers import SD, drawn, seeded, toy

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")

# Without new noise, which theirs adds with the wrong sign of the third order's last term (see below).
ORDER_3 = {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
BH1 = {"solver_type": "bh1", "disable_corrector": [0, 3]}
CLIP = {"clip_sample": True, "clip_sample_range": 3.0}

# Name of ours: name of theirs, what is added to a config for both, to theirs alone, to step() and to ours.
KINDS = {
    "ddim": ("DDIMScheduler", CLIP, {}, {}),
    "ddim eta": ("DDIMScheduler", CLIP, {}, {"eta": 0.7}),
    "ddim to one": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, {}, {}),
    "ddpm": ("DDPMScheduler", CLIP | {"variance_type": "fixed_small"}, {}, {}),
    "ddpm large": ("DDPMScheduler", CLIP | {"variance_type": "fixed_large"}, {}, {}),
    "pndm": ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": True}, {}, {}),
    "pndm to one": ("PNDMScheduler", {"set_alpha_to_one": True, "skip_prk_steps": True}, {}, {}),
    "pndm prk": ("PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": False}, {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}, {}),
    "euler sigma_min": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {}, {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, {}, {}),
    "dpmpp_2m heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, {}, {}),
    "dpmpp_2m sigma_min": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}, {}),
    "dpmpp_2m sigma_min euler": (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False},
        {},
        {},
    ),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {}, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpmpp_2m_sde heun": (
        "DPMSolverMultistepScheduler", {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"}, {},
    ),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {}, ORDER_3, {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, {}, {}),
    "heun": ("HeunDiscreteScheduler", CLIP, {}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}, {}),
    "unipc sigma_min": ("UniPCMultistepScheduler", SIGMA_MIN | {"lower_order_final": False}, {}, {}),
    "unipc bh1": ("UniPCMultistepScheduler", SIGMA_MIN | BH1, {}, {}),
    "lcm": ("LCMScheduler", {}, {}, {}),
}  # fmt: skip
LEVELS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "heun", "unipc")
NO_ZERO_SNR = ("pndm", "dpmpp_sde", "heun")  # whose classes cannot have such a network
NO_SAMPLE = ("pndm", "euler_ancestral", "dpmpp_sde")  # which cannot have a network that predicts x_0

# What diffusers has: kind, prediction type, and how the sigmas are spaced.
CASES = [
    pytest.param(kind, prediction_type, levels, id=f"{kind} {prediction_type} {levels}".strip())
    for kind in KINDS
    for prediction_type in ("epsilon", "v_prediction", "sample")
    for levels in ("", "karras", "exponential")
    if (not levels or kind.split()[0] in LEVELS)
    and (prediction_type != "sample" or kind.split()[0] not in NO_SAMPLE)
]


class Path:
    """The Brownian motion over sigma that diffusers would take from torchsde, of the draws that we make."""

    def __init__(self, generators, shape):
        self.generators, self.shape, self.at = generators, shape, {}

    def __call__(self, sigma, after):
        sigma, after = float(sigma), float(after)
        begin = self.at.setdefault(sigma, torch.zeros(len(self.generators), *self.shape))
        near = min((s for s in self.at if s > after), key=lambda s: s - after)
        step = randn(self.shape, self.generators) * math.sqrt(near - after)
        self.at[after] = self.at[near] + step
        return (self.at[after] - begin) / math.sqrt(sigma - after)


def make_theirs(kind, config, monkeypatch):
    name, both, alone, _ = KINDS[kind]
    config = SD | config | both | alone
    if name == "DPMSolverSDEScheduler":  # its module wants torchsde at the top
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        return module.DPMSolverSDEScheduler(**config)
    theirs = getattr(diffusers, name)(**config)
    if config.get("use_exponential_sigmas") and name in (
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        exact = theirs._sigma_to_t  # of which theirs drops the fraction, so that 998.99997 is 998
        theirs._sigma_to_t = lambda sigma, logs: exact(sigma, logs).round()
    return theirs


def theirs_draws(theirs, kind, steps, strength=1.0, latents=None, mask=None):
    """x after each step, as diffusers' pipelines for text, pictures, and masks with 4 channels compute it."""
    generators = seeded(5, 6)
    noise = randn((4, 3, 3), generators)
    theirs.set_timesteps(steps)
    begin = max(steps - int(steps * strength), 0) * theirs.order
    timesteps = theirs.timesteps[begin:]
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin)
    x = noise * theirs.init_noise_sigma
    if latents is not None and (mask is None or strength < 1):
        x = theirs.add_noise(latents, noise, timesteps[:1])
    options = dict(KINDS[kind][3])
    if kind == "dpmpp_sde":
        theirs.noise_sampler = Path(generators, (4, 3, 3))
    elif kind.split()[0] not in ("pndm", "dpmpp_sde", "heun", "unipc"):
        options["generator"] = generators
    made = []
    for i, t in enumerate(timesteps):
        pred = toy(theirs.scale_model_input(x, t), t.item())
        x = theirs.step(pred, t, x, **options).prev_sample
        # Theirs blend between the two halves of a step of order 2 as well, at a level that x is not at.
        if mask is not None and not (theirs.order == 2 and i % 2 == 0 and i + 1 < len(timesteps)):
            known = latents
            if i + 1 < len(timesteps):
                known = theirs.add_noise(latents, noise, timesteps[i + 1 : i + 2])
            x = (1 - mask) * known + mask * x
        made.append(x)
    if kind == "pndm prk":
        return made[3:12:4] + made[12:]  # three steps of four predictions
    if kind.startswith("pndm"):
        return made[1:] or made  # the first step is taken twice
    return [*made[1::2], made[-1]] if theirs.order == 2 else made


def ours_draws(kind, prediction_type, config, steps, init_image=None, **law):
    generators = seeded(5, 6)
    x = randn((4, 3, 3), generators)
    settings = config | KINDS[kind][1] | KINDS[kind][3] | ({"eta": 0.0} if kind == "dpmpp_3m_sde" else {})
    schedule = NoiseSchedule(**SD, prediction_type=prediction_type, **law)
    scheduler = registry.load("schedulers", kind.split()[0])
    return drawn(scheduler, steps, x, generators, schedule=schedule, init_image=init_image, **settings)


def compare(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def settings_of(kind, spacing, levels):
    if kind == "lcm":
        return {}
    config = {"timestep_spacing": spacing, "steps_offset": 1}
    return config | ({f"use_{levels}_sigmas": True} if levels else {})


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind, prediction_type, levels", CASES)
def test_equals_diffusers(kind, prediction_type, levels, spacing, monkeypatch):
    config = settings_of(kind, spacing, levels)
    theirs = make_theirs(kind, config | {"prediction_type": prediction_type}, monkeypatch)
    # Theirs ends a single step of unipc to sigma_min where it began, and heun's one from 999 to 0 is too long
    # for fp32: an error at its end counts 500 times.
    odd = {"pndm prk": (4, 5, 20), "heun": (1, 5, 20), "unipc sigma_min": (2, 5, 20), "unipc bh1": (2, 5, 20)}
    for steps in odd.get(kind, (1, 2, 5, 20)):
        expected = theirs_draws(theirs, kind, steps)
        compare(ours_draws(kind, prediction_type, config, steps), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if " " not in kind])
def test_initial_image_as_in_diffusers_pipelines(kind, spacing, strength, masked, monkeypatch):
    """img2img's start and 4-channel inpainting's, which at strength 1 begins with noise alone."""
    config, steps = settings_of(kind, spacing, ""), 7
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9).view(1, 1, 3, 3) % 2).float() if masked else None
    theirs = make_theirs(kind, config, monkeypatch)
    expected = theirs_draws(theirs, kind, steps, strength, latents, mask)
    init_image = InitImage(latents=latents, first_step=steps - int(steps * strength), mask=mask)
    compare(ours_draws(kind, "epsilon", config, steps, init_image), expected)


ZERO_SNR = [
    case for case in CASES
    if case.values[1] != "epsilon" and case.values[0].split()[0] not in NO_ZERO_SNR
]  # fmt: skip


@pytest.mark.parametrize("kind, prediction_type, levels", ZERO_SNR)
def test_zero_terminal_snr(kind, prediction_type, levels, monkeypatch):
    """At the last timestep nothing is left of the picture: sigma is made finite there. Theirs computes in
    fp32 with a sigma of 4096, so that it cannot be nearer than this."""
    config, law = settings_of(kind, "trailing", levels), {"rescale_betas_zero_snr": True}
    theirs = make_theirs(kind, config | law | {"prediction_type": prediction_type}, monkeypatch)
    expected = theirs_draws(theirs, kind, 10)
    compare(ours_draws(kind, prediction_type, config, 10, **law), expected, 5e-5)


@pytest.mark.parametrize("kind", ["ddim", "pndm", "pndm prk", "euler", "dpmpp_2m", "lcm"])
def test_timesteps_for_every_number_of_steps(kind, monkeypatch):
    for spacing in ["leading", "linspace", "trailing"]:
        config = settings_of(kind, spacing, "") | KINDS[kind][1]
        theirs = make_theirs(kind, config, monkeypatch)
        for steps in range(4 if kind == "pndm prk" else 1, 51):
            theirs.set_timesteps(steps)
            if len(theirs.timesteps) > steps + {"pndm": 1, "pndm prk": 9}.get(kind, 0):
                continue  # its arange has one too many, by rounding
            seen = []

            def denoise(x, t, seen=seen):
                seen.append(t)
                return x

            scheduler = registry.load("schedulers", kind.split()[0])
            drawn(scheduler, steps, torch.zeros(1, 1), [torch.Generator()], denoise, **config)
            assert seen == pytest.approx(theirs.timesteps.tolist(), abs=2e-3)


# A value other than the default for each key of theirs; the law of the noise and the spacing vary above.
OTHER = {
    "steps_offset": 3, "clip_sample": True, "clip_sample_range": 0.7, "set_alpha_to_one": [True, False],
    "thresholding": True, "variance_type": ["fixed_large", "fixed_small_log", "learned", "learned_range"],
    "skip_prk_steps": [True, False], "use_karras_sigmas": True, "use_exponential_sigmas": True,
    "use_beta_sigmas": True, "use_lu_lambdas": True, "use_flow_sigmas": True, "flow_shift": 3.0,
    "final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True,
    "solver_order": [1, 3], "solver_type": ["heun", "logrho", "bh1", "bh2"], "lambda_min_clipped": -5.1,
    "algorithm_type": ["dpmsolver", "sde-dpmsolver"], "sigma_min": 0.1, "sigma_max": 5.0,
    "timestep_type": "continuous", "interpolation_type": "log_linear", "original_inference_steps": 25,
    "timestep_scaling": 3.0, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 0.5,
    "noise_sampler_seed": 3, "predict_x0": False, "disable_corrector": [[0, 2]], "solver_p": {"a": 1},
    "shift_terminal": 0.1, "use_dynamic_shifting": True, "time_shift_type": "linear",
}  # fmt: skip
SHAPE = {
    "num_train_timesteps",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "rescale_betas_zero_snr",
}
SHAPE |= SD.keys()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if " " not in kind])
def test_no_key_of_a_config_is_ignored(kind, monkeypatch):
    """Every value of every key of theirs is refused when the file is read, or has the same effect here."""
    theirs = make_theirs(kind, {}, monkeypatch)
    keys = inspect.signature(type(theirs).__init__).parameters.keys() - SHAPE - {"self"}
    assert keys <= OTHER.keys(), "a key that this test does not know"
    count = 0
    for key in sorted(keys):
        values = OTHER[key] if isinstance(OTHER[key], list) else [OTHER[key]]
        for value in values:
            config = {key: value}
            try:
                config_json.read_scheduler(config, "x")
            except ValueError:
                continue
            expected = theirs_draws(make_theirs(kind, config, monkeypatch), kind, 6)
            if not expected[-1].isfinite().all():
                continue  # such as theirs with bh1 in the step to 0
            compare(ours_draws(kind, "epsilon", config, 6), expected)
            count += 1
    assert count


@pytest.fixture(scope="module")
def both(model):
    from minisd.sampling.stable_diffusion import StableDiffusion

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return StableDiffusion.load(model), pipe, pipe.scheduler.config


PICTURES = [
    case
    for case in CASES
    if case.values[0]
    in ("ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc", "lcm")
    and case.values[1] == "epsilon"
]


@pytest.mark.parametrize("kind, prediction_type, levels", PICTURES)
def test_pictures_equal_those_of_the_pipeline(kind, prediction_type, levels, both):
    """With the model's own scheduler_config.json, as from_config makes another scheduler of it."""
    import numpy as np

    from minisd.sampling.generate import Settings, pictures

    sd, pipe, config = both
    name, _, alone, _ = KINDS[kind]
    further = alone | ({f"use_{levels}_sigmas": True} if levels else {}) | {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, name).from_config(config, **further)
    prompts = ["a cat", "a dog"]
    expected = pipe(prompts, width=32, height=32, generator=seeded(3, 4), num_inference_steps=4).images
    settings = Settings(width=32, height=32, steps=4, scheduler=kind, schedule_type=levels or None)
    for a, b in zip(pictures(sd, prompts, [3, 4], settings), expected, strict=True):
        error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
        assert np.asarray(a).std() > 3
        assert error == 0 or 10 * math.log10(255**2 / error) >= 50


def test_a_folder_without_skip_prk_steps(model):
    """Such as one of DDIM: theirs begins by Runge-Kutta steps, and so does ours."""
    from minisd.sampling.generate import Settings, pictures
    from minisd.sampling.stable_diffusion import StableDiffusion
    from tests.picture_helpers import psnr

    sd = StableDiffusion.load(model)
    del sd.scheduler["skip_prk_steps"]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = {name: value for name, value in pipe.scheduler.config.items() if name != "skip_prk_steps"}
    drawn = next(pictures(sd, ["a cat"], [3], Settings(width=32, height=32, steps=6, scheduler="pndm")))
    for settings, same in ((config, True), (config | {"skip_prk_steps": True}, False)):
        pipe.scheduler = diffusers.PNDMScheduler.from_config(settings)
        expected = pipe("a cat", width=32, height=32, generator=seeded(3), num_inference_steps=6).images[0]
        assert (psnr(drawn, expected) >= 50) == same


@pytest.mark.parametrize(
    "scheduler, flags, message",
    [
        ("ddim", {"use_karras_sigmas": True}, "--use_karras_sigmas has no effect with --scheduler ddim"),
        ("lcm", {"use_karras_sigmas": False}, "--use_karras_sigmas has no effect with --scheduler lcm"),
        ("PLMS", {"eta": 0.5}, "--eta has no effect with --scheduler pndm"),
        ("eulr", {}, "unknown scheduler 'eulr'; did you mean 'euler'"),
    ],
)
def test_flags_that_a_scheduler_does_not_have(both, scheduler, flags, message):
    from minisd.sampling.generate import Settings, denoise

    with pytest.raises(ValueError, match=message):
        settings = Settings(width=32, height=32, steps=2, scheduler=scheduler, **flags)
        next(denoise(both[0], ["a cat"], [1], settings))
