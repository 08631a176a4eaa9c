"""The model in a notebook: it draws by itself, with the flags of sample.py as keywords."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.sampling.generate import drawing, pictures
from minisd.sampling.input_images import Inputs
from minisd.sampling.options import Sample
from minisd.sampling.run import LOADING
from minisd.sampling.stable_diffusion import StableDiffusion

# Flags that say what to load, and where pictures go.
ELSEWHERE = {*LOADING, "prompt_file", "like", "csv", "output", "preview", "export"}


class Model(StableDiffusion):
    """The assembled model, which draws."""

    def generate(
        self,
        prompt: str | list[str],
        *,
        on_step: Callable[[int], None] = lambda n: None,
        on_preview: Callable[[list[Image.Image]], None] | None = None,
        **flags,
    ) -> list[Image.Image]:
        """One picture for each prompt, with seeds from `seed` on. `flags` are those of sample.py that say
        what to draw: steps, seed, width, negative_prompt, num_images, lora_dir, image, mask, controlnet, ...;
        a picture may also be given as it is. `on_step(n)` hears of every step that n pictures took, and
        `on_preview` gets what they are about to be. ValueError as sample.py says it."""
        return list(pictures(self, **self._arguments(prompt, flags), on_step=on_step, on_preview=on_preview))

    @torch.no_grad()
    def steps(self, prompt: str, **flags) -> Iterator[Tensor]:
        """The latents (1, 4, h, w) after each step of one picture; `flags` are as in `generate`."""
        (steps,) = drawing(self, **self._arguments([prompt], flags))
        yield from steps

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Latents (b, 4, h, w) decoded."""
        return [images.to_pil(pixels) for pixels in self.decode(latents)]

    def _arguments(self, prompt: str | list[str], flags: dict) -> dict:
        known = [f.name for f in fields(Sample) if f.name not in ELSEWHERE]
        for name in flags.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"there is no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        kinds = typing.get_type_hints(Sample)
        given = {name: fitted(value, kinds[name]) for name, value in ({"prompt": prompt} | flags).items()}
        return Inputs(Sample(model=self.name, **given)).arguments(self)


def fitted(value, kind):
    """A value as the command line would have made it: in a list where that is wanted, and paths of text."""
    if typing.get_origin(kind) is list:
        many = value if isinstance(value, list | tuple) else [value]
        return [fitted(one, typing.get_args(kind)[0]) for one in many]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return Path(value) if Path in kinds and isinstance(value, str) else value
