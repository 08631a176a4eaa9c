"""The loss of held-out examples, and images of what a run has learned so far."""

import torch

from minisd.data.order import Stream, collate
from minisd.methods._base import Method
from minisd.training.run_folder import RunFolder


def validate(method: Method, held_out, folder: RunFolder, step: int, images: bool) -> None:
    """Log the loss of the held-out examples, if there are any; with `images`, save the method's preview."""
    if held_out:
        folder.log(step, validation_loss=held_out_loss(method, held_out))
    image = method.preview(final=False) if images else None
    if image is not None:
        folder.save_image(step, "validation", image, f"validation/step-{step:06}.png")


@torch.no_grad()
def held_out_loss(method: Method, held_out) -> float:
    """The mean loss of the held-out examples. Number k of n has the timestep (k + 1/2) / n of the schedule,
    and the noise, crop and caption of its number."""
    stream, count, losses = Stream(held_out, method.options.seed), len(held_out), []
    total = method.sd.schedule.num_train_timesteps
    for k in range(count):  # one by one, because they may have different shapes
        fixed = {"number": f"held out {k}", "timestep": total * (2 * k + 1) // (2 * count)}
        losses.append(method.loss(collate([[sample | fixed for sample in stream[k]]])))
    return torch.stack(losses).mean().item()
