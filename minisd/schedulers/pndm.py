"""PNDM: DDIM steps with a multistep prediction, PLMS (Liu et al. 2022, arXiv 2202.09778)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import TIMESTEPS, Problem

DIFFUSERS = "PNDMScheduler"
A1111 = "PLMS"
SETTINGS = TIMESTEPS | {"set_alpha_to_one": False, "skip_prk_steps": False}

# Adams-Bashforth weights of the newest predictions, newest first.
WEIGHTS = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithm 2: three pseudo Runge-Kutta steps of four predictions each, then PLMS.

    With `skip_prk_steps`, as Stable Diffusion is published, PLMS alone: the first step is taken twice, the
    second time with the mean of the predictions at its two ends.
    """
    schedule, skip = problem.schedule, problem.settings["skip_prk_steps"]
    timesteps = problem.timesteps().round().int().tolist()
    if skip:
        timesteps = timesteps[:2] + timesteps[1:]
    jump = schedule.num_train_timesteps // problem.steps
    alphas_cumprod = problem.alphas_cumprod(to_one=problem.settings["set_alpha_to_one"])
    bars = alphas_cumprod[timesteps]

    def move(x: Tensor, pred: Tensor, t: int, after: int) -> Tensor:
        """Equation 11: x at `after`, from x at t and its prediction."""
        denoised, noise = schedule.split(pred, x, alphas_cumprod[t])
        alpha_after = alphas_cumprod[max(after, -1)]
        return alpha_after.sqrt() * denoised + (1 - alpha_after).sqrt() * noise

    def runge_kutta(x: Tensor, t: int, after: int) -> tuple[Tensor, Tensor]:
        """Equation 13: x at `after`, and the prediction at t."""
        middle = after + jump // 2
        first = problem.denoise(x, t)
        second = problem.denoise(move(x, first, t, t - jump // 2), middle)
        third = problem.denoise(move(x, second, t, middle), middle)
        fourth = problem.denoise(move(x, third, t, after), after)
        return move(x, (first + 2 * second + 2 * third + fourth) / 6, t, after), first

    x, steps = problem.begin(bars.sqrt(), (1 - bars).sqrt())
    if not skip and len(steps) < 4:
        raise ValueError(f"--steps: pndm without skip_prk_steps takes 4 or more, and {len(steps)} are left")
    start, preds = x, []
    for step in steps:
        t, number = timesteps[step], step - steps.start
        if not skip and number < 3:
            x, pred = runge_kutta(x, t, timesteps[step + 1])
            preds = [pred, *preds]
        elif skip and number == 1:
            x = move(start, (problem.denoise(x, t) + preds[0]) / 2, t + jump, t)
        else:
            preds = [problem.denoise(x, t), *preds[:3]]
            pred = sum(weight * p for weight, p in zip(WEIGHTS[len(preds) - 1], preds, strict=True))
            x = move(x, pred, t, t - jump)
        x = problem.keep(x, step)
        if not skip or number > 0 or len(steps) == 1:  # the first attempt is not a step
            yield x
