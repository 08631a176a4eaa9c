"""LCM: few steps of a distilled model, each to x_0 and back to noise (Luo et al. 2023, arXiv 2310.04378)."""

from collections.abc import Iterator

from torch import Tensor

from minisd.schedulers._problem import CLIPPING, Problem

DIFFUSERS = "LCMScheduler"
A1111 = "LCM"
SETTINGS = CLIPPING | {"clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}


def spacing(total: int, count: int) -> int:
    """The number of timesteps between two of the `count` of the distillation, of `total` that the model has.
    ValueError if it has fewer."""
    if count > total:
        raise ValueError(f"lcm takes {count} of the model's timesteps (original_inference_steps), of {total}")
    return total // count


def consistency(x: Tensor, denoised: Tensor, t: float | Tensor, scaling: float) -> Tensor:
    """The consistency function c_skip x + c_out x_0, where c_skip is 1 and c_out 0 at timestep t = 0 (Song et
    al. 2023, arXiv 2303.01469, appendix C)."""
    scaled = t * scaling / 0.5  # 0.5 is the standard deviation of the data
    return scaled / (scaled**2 + 1) ** 0.5 * denoised + x / (scaled**2 + 1)


def sample(problem: Problem) -> Iterator[Tensor]:
    """Algorithm 3, at `steps` of the `original_inference_steps` timesteps of the distillation."""
    count, scaling = problem.settings["original_inference_steps"], problem.settings["timestep_scaling"]
    if not 1 <= problem.steps <= count:
        raise ValueError(f"--steps {problem.steps}: lcm takes from 1 to {count}")
    apart = spacing(problem.schedule.num_train_timesteps, count)
    distilled = [apart * (i + 1) - 1 for i in reversed(range(count))]
    timesteps = [distilled[i * count // problem.steps] for i in range(problem.steps)]
    bars = problem.alphas_cumprod()[timesteps]
    x, steps = problem.begin(bars.sqrt(), (1 - bars).sqrt())
    for step in steps:
        denoised, _ = problem.predict(x, timesteps[step], bars[step])
        x = consistency(x, denoised, timesteps[step], scaling)
        if step < problem.steps - 1:
            x = bars[step + 1].sqrt() * x + (1 - bars[step + 1]).sqrt() * problem.new_noise()
        x = problem.keep(x, step)
        yield x
