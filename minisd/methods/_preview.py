"""Images that show what a run has learned, generated with the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd.data import images
from minisd.methods._base import Method
from minisd.methods._types import Prompts
from minisd.sampling.generate import Settings, pictures


def sheet(method: Method, prompts: Prompts) -> Image.Image:
    """A row for each prompt: the image that conditions it, then what is generated."""
    rows = []
    for prompt, image in prompts:
        shown = [] if image is None else [images.to_pil(image)]
        rows.append((prompt, shown + samples(method, prompt, image)))
    return images.labelled_rows(rows)


def samples(method: Method, prompt: str, image: Tensor | None = None) -> list[Image.Image]:
    """The images of a prompt, from the same noise every time."""
    o, count = method.options, method.options.num_validation_images
    settings = Settings(
        width=o.resolution,
        height=o.resolution,
        steps=25,
        guidance_scale=o.validation_guidance_scale,
        scheduler=o.validation_scheduler,
        plain_prompt=True,
    )
    kwargs = {} if image is None else method.sampling_kwargs(image.expand(count, -1, -1, -1))
    seeds = [o.seed + i for i in range(count)]
    with progress(method, count * settings.steps) as on_step:
        return list(pictures(method.sd, [prompt] * count, seeds, settings, on_step=on_step, **kwargs))


@contextmanager
def progress(method: Method, steps: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of so many steps, in the precision of the run. Yields what advances it."""
    with tqdm(total=steps, desc="drawing", leave=False) as bar, method.autocast():
        yield bar.update
