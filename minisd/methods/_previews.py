"""The images that show what a run has learned: their prompts, which methods override, and their drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minisd.options import Validation

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    Prompts = list[tuple[str, Tensor | None]]  # each with its conditioning image (3, h, w) in [-1, 1]


class Previews:
    """The part of a method that makes images of what is being trained, for the training loop to save."""

    def preview(self, final: bool) -> Image | None:
        """The image to save during training, if a flag asks for one, or at the end of it (`final`): a row for
        each prompt, with its conditioning image first."""
        from minisd.data import images

        prompts = self.validation_prompts or (self.training_prompts() if final else [])
        rows = []
        for prompt, image in prompts:
            conditioning = [] if image is None else [images.to_pil(image)]
            rows.append((prompt, conditioning + self.samples(prompt, image)))
        return images.labelled_rows(rows) if rows else None

    def read_validation_prompts(self) -> Prompts:
        """The prompts to validate with, from the flags."""
        o = self.options
        return [(o.validation_prompt, None)] if isinstance(o, Validation) and o.validation_prompt else []

    def training_prompts(self) -> Prompts:
        """The prompts of the final preview if no flag gives any: one of the training set."""
        from minisd.noise import generator

        example = self.data.examples(0, generator(self.options.seed, "result"))[0]
        return [(example.prompt, self.conditioning_image(example.view))]

    def conditioning_image(self, view) -> Tensor | None:
        """The image (3, h, w) in [-1, 1] that conditions a view of the training set."""
        return None

    def sampling_kwargs(self, images: Tensor) -> dict:
        """The arguments of generate.pictures for conditioning images (b, 3, h, w) in [-1, 1]."""
        raise NotImplementedError

    def samples(self, prompt: str, image: Tensor | None = None) -> list[Image]:
        """--num_validation_images images for a prompt, from the same noise every time; `image` (3, h, w) in
        [-1, 1] conditions them."""
        from tqdm import tqdm

        from minisd.sampling.generate import Settings, pictures

        o, count = self.options, self.options.num_validation_images
        chosen = {"guidance_scale": o.validation_guidance_scale, "scheduler": o.validation_scheduler}
        settings = Settings(width=o.resolution, height=o.resolution, steps=25, plain_prompt=True, **chosen)
        kwargs = {} if image is None else self.sampling_kwargs(image.expand(count, -1, -1, -1))
        seeds = [o.seed + i for i in range(count)]
        with tqdm(total=count * settings.steps, desc="drawing", leave=False) as bar, self.autocast():
            return list(pictures(self.sd, [prompt] * count, seeds, settings, on_step=bar.update, **kwargs))
