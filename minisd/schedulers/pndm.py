"""PNDM: DDIM steps with a multistep prediction, PLMS (Liu et al. 2022, arXiv 2202.09778)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import TIMESTEPS, Problem

DIFFUSERS = "PNDMScheduler"
A1111 = "PLMS"
SETTINGS = TIMESTEPS | {"set_alpha_to_one": False}

# Adams-Bashforth weights of the newest predictions, newest first.
WEIGHTS = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def sample(problem: Problem) -> Iterator[Tensor]:
    """PLMS without the paper's initial Runge-Kutta steps: instead, the first step is taken twice, the second
    time with the mean of the predictions at its two ends. So there is one prediction more than steps."""
    schedule = problem.schedule
    timesteps = problem.timesteps().round().int().tolist()
    timesteps = timesteps[:2] + timesteps[1:]
    jump = schedule.num_train_timesteps // problem.steps
    alphas_cumprod = problem.alphas_cumprod(to_one=problem.settings["set_alpha_to_one"])
    bars = alphas_cumprod[timesteps]
    x, steps = problem.begin(bars.sqrt(), (1 - bars).sqrt())
    start, preds = x, []
    for step in steps:
        t = timesteps[step]
        pred, after = problem.denoise(x, t), t - jump
        if step == steps.start + 1:
            pred, x, t, after = (pred + preds[0]) / 2, start, t + jump, t
        else:
            preds = [pred, *preds[:3]]
            pred = sum(weight * p for weight, p in zip(WEIGHTS[len(preds) - 1], preds, strict=True))
        denoised, noise = schedule.split(pred, x, alphas_cumprod[t])
        alpha_after = alphas_cumprod[max(after, -1)]
        x = alpha_after.sqrt() * denoised + (1 - alpha_after).sqrt() * noise
        x = problem.keep(x, step)
        if step > steps.start or len(steps) == 1:  # the first attempt is not a step
            yield x
