"""The model in a notebook: it draws by itself, with the flags of sample.py as keywords."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.sampling.generate import denoise, pictures
from minisd.sampling.options import Drawing
from minisd.sampling.run import Request
from minisd.sampling.stable_diffusion import StableDiffusion


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
        an image may also be given as it is. `on_step(n)` is called after each step of n pictures, and
        `on_preview` with previews of them. ValueError as sample.py says it."""
        arguments = request(prompt, flags).arguments(self)
        return list(pictures(self, **arguments, on_step=on_step, on_preview=on_preview))

    def steps(self, prompt: str, **flags) -> Iterator[Tensor]:
        """Yield the latents (1, 4, h, w) after each step of one picture; `flags` are as in `generate`."""
        arguments = request(prompt, flags).arguments(self)
        del arguments["batch_size"]
        yield from denoise(self, **arguments)

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Latents (b, 4, h, w) decoded."""
        return [images.to_pil(pixels) for pixels in self.decode(latents)]


def request(prompt: str | list[str], flags: dict[str, object]) -> Request:
    """What to draw, by the names of flags. TypeError for one that does not exist."""
    names = {name: f for f in fields(Drawing) for name in (f.name, *f.metadata["also"])}
    for name in flags.keys() - names.keys():
        close = difflib.get_close_matches(name, names, n=1)
        raise TypeError(f"there is no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    options = {names[n].name: fitted(v, names[n].type) for n, v in ({"prompt": prompt} | flags).items()}
    return Request(Drawing(**options), options["prompt"])


def fitted(value: object, kind: type | types.GenericAlias | types.UnionType) -> object:
    """A value as the command line would have made it: in a list where one is needed, and paths from text."""
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list | tuple) else [value]
        return [fitted(one, typing.get_args(kind)[0]) for one in values]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return Path(value) if Path in kinds and isinstance(value, str) else value
