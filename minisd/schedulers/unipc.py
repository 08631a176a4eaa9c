"""UniPC: DPM-Solver++ 2M's step, corrected by the next prediction (Zhao et al. 2023, arXiv 2302.04867)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS, MultistepSchedule

DIFFUSERS = "UniPCMultistepScheduler"
A1111 = "UniPC"
SETTINGS = SIGMAS | {
    "final_sigmas_type": "zero", "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [],
}  # fmt: skip


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithms 5 to 7, for predictions of x_0, of order 2. Of the functions B(h) (equation 8), solver_type
    "bh1" is B1, h, and any other name B2, 1 - exp(-h) here. The step after one in `disable_corrector` begins
    without a correction."""
    settings, schedule = problem.settings, MultistepSchedule(problem)
    last = problem.steps - 1 if settings["lower_order_final"] or schedule.sigmas[-1] == 0 else problem.steps

    def move(x: Tensor, step: int, preds: list[Tensor], end: Tensor | None = None) -> Tensor:
        """x after `step`, from the predictions at its start and one step before, and that at its `end`."""
        signal, ratio, h = schedule.signal[step + 1], schedule.ratio(step), schedule.h(step)
        moved = schedule.noise[step + 1] / schedule.noise[step] * x + signal * (1 - ratio) * preds[0]
        middle = (h if settings["solver_type"] == "bh1" else 1 - ratio) / 2
        slopes, weights = [], []  # of x_0 over the step, by the prediction before and by that at the end
        if len(preds) == 2 and step != last:
            h_previous = schedule.h(step - 1)
            slopes, weights = [(preds[0] - preds[1]) * (h / h_previous)], [middle]
        if end is not None:
            slopes, weights = [*slopes, end - preds[0]], [middle]
            if len(slopes) == 2 and h > 0:  # exact for an x_0 on the parabola through the three
                first = 1 - (1 - ratio) / h
                weight = (first - 1 + 2 * first / h) / (1 + h_previous / h)
                weights = [weight, first - weight]
        for slope, weight in zip(slopes, weights, strict=True):
            moved = moved + signal * weight * slope
        return moved

    x, steps = schedule.begin()
    preds, start = [], x
    for step in steps:
        denoised = schedule.denoised(x, step)
        corrects = preds and step - 1 not in settings["disable_corrector"]
        start = move(start, step - 1, preds, denoised) if corrects else x
        preds = [denoised, *preds[:1]]
        x = problem.keep(move(start, step, preds), step)
        yield x
