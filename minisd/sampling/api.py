"""The model in a notebook: it generates images by the flags of sample.py, given as keywords."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.formats import diffusers, hub
from minisd.sampling import generate
from minisd.sampling.edit import edit
from minisd.sampling.invert import invert
from minisd.sampling.options import Drawing
from minisd.sampling.pixel_diffusion import PixelDiffusion
from minisd.sampling.run import Request
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.sampling.watch import watch


class Generates:
    """Methods to generate images, the same for both kinds of models."""

    draw, denoise, watch = generate.pictures, generate.denoise, watch

    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        noise: Tensor | None = None,
        on_step: Callable[[int], None] = lambda n: None,
        on_preview: Callable[[list[Image.Image]], None] | None = None,
        **flags,
    ) -> list[Image.Image]:
        """Return the images of the prompts, with seeds from `seed` on; a model of pixels takes no prompt.
        `flags` are sample.py's flags about the image: steps, seed, width, negative_prompt, num_images,
        lora_dir, image, mask, controlnet, ...; input images may be paths or PIL images. `on_step(n)` is
        called after each step of n images, and `on_preview` with previews of them. `noise` (images, 4, h, w)
        replaces that of the seeds. ValueError, naming the flag, as in sample.py."""
        given = self._arguments(prompt, flags)
        return list(self.draw(**given, noise=noise, on_step=on_step, on_preview=on_preview))

    def steps(self, prompt: str | None = None, *, noise: Tensor | None = None, **flags) -> Iterator[Tensor]:
        """Yield the latents (1, 4, h, w), or the pixels, after each step of one image; `noise` and `flags`
        are as in `generate`."""
        arguments = self._arguments(prompt, flags)
        del arguments["batch_size"]
        yield from self.denoise(**arguments, noise=noise)

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents (b, 4, h, w), or pixels, to images."""
        return [images.to_pil(pixels) for pixels in self.decode(latents)]

    def _arguments(self, prompt: str | list[str] | None, flags: dict[str, object]) -> dict:
        """The keywords of `draw` for these flags. TypeError for an unknown flag."""
        names = {name: f for f in fields(Drawing) for name in (f.name, *f.metadata["also"])}
        for name in flags.keys() - names.keys():
            close = difflib.get_close_matches(name, names, n=1)
            raise TypeError(f"there is no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        given = ({} if prompt is None else {"prompt": prompt}) | flags
        values = {names[n].name: _typed(v, names[n].type) for n, v in given.items()}
        return Request(Drawing(**values), values.get("prompt", [""])).arguments(self)


class Model(Generates, StableDiffusion):
    """The assembled model, with methods to generate images."""

    flags = None  # it takes them all
    predict, invert, edit = generate.predict, invert, edit


class PixelModel(Generates, PixelDiffusion):
    """The model without text, with methods to generate images."""

    flags = {
        "steps", "scheduler", "schedule_type", "use_karras_sigmas", "eta", "rng", "width", "height", "seed",
        "num_images", "batch_size", "model", "revision", "variant", "cache_dir", "device", "kernels", "dtype",
        "like", "csv", "output", "preview",
    }  # fmt: skip


def load(model: str | Path, **options) -> Model | PixelModel:
    """Load a model of either kind; `options` are those of StableDiffusion.load. ValueError, naming the file,
    if there is none."""
    where = {name: options[name] for name in ("revision", "variant", "cache_dir") if name in options}
    path = hub.resolve(model, **where)
    return (PixelModel if diffusers.is_pixels(path) else Model).load(path, **options)


def _typed(value: object, kind: type | types.GenericAlias | types.UnionType) -> object:
    """A value as the command line parses it: a list if the flag takes several, a path instead of text."""
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list | tuple) else [value]
        return [_typed(one, typing.get_args(kind)[0]) for one in values]
    return Path(value) if isinstance(value, str) and kind in (Path, Path | None) else value
