"""DPM-Solver++ 3M SDE: third order, from the last three predictions, with new noise at each step (the solver
of k-diffusion, after arXiv 2211.01095)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers import dpmpp_2m
from minisd.schedulers._problem import Problem
from minisd.schedulers._sigmas import SIGMAS

A1111 = "DPM++ 3M SDE"
SETTINGS = SIGMAS | {"eta": 1.0, "final_sigmas_type": "zero"}
FIXED = {"solver_type": "heun", "lower_order_final": False, "euler_at_final": False}


def sample(problem: Problem) -> Iterator[Tensor]:
    """As in `dpmpp_2m`. The first step is of order 1 and the second of order 2; the step to a sigma of 0 ends
    at x_0."""
    return dpmpp_2m.sample(problem, order=3, **FIXED)
