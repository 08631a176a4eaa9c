"""Train the whole UNet to edit images by instructions (InstructPix2Pix, arXiv 2211.09800)."""

from pathlib import Path

from minisd.methods._base import Method, Parameters, Prompts, StableDiffusion, Tensor
from minisd.options import Average, Dataset, Training, flag, require


class Options(Dataset, Average, Training):
    """InstructPix2Pix"""

    original_image_column: str = flag("input_image", "column of the images before the edit")
    edited_image_column: str = flag("edited_image", "column of the images after the edit")
    edit_prompt_column: str = flag("edit_prompt", "column of the edit instructions")
    random_flip: bool = flag(False, "flip both images of a pair with probability 1/2")
    conditioning_dropout_prob: float | None = flag(None, "probability of no prompt, no image, and neither")
    val_image_url: str | None = flag(None, "address or path of an image to validate with", free=True)
    revision: str | None = flag(None, "branch, tag or commit of a hub id", also=("non_ema_revision",))
    validation_guidance_scale: float = flag(7.0)
    validation_steps: int | None = flag(None)
    validation_epochs: int | None = flag(1)
    resolution: int = flag(256)
    train_batch_size: int = flag(16)
    learning_rate: float = flag(1e-4)
    output_dir: Path = flag(Path("instruct-pix2pix-model"))

    def check(self):
        p = self.conditioning_dropout_prob
        require(p is None or 0 <= p <= 1 / 3, "--conditioning_dropout_prob must be from 0 to 1/3")
        both = bool(self.val_image_url) == bool(self.validation_prompt)
        require(both, "--val_image_url and --validation_prompt go together: give both or neither")


class InstructPix2Pix(Method):
    """The UNet gets the latents of the original image beside the noisy ones of the edited image."""

    def build(self, sd: StableDiffusion) -> Parameters:
        channels, latents = sd.unet.config.in_channels, sd.vae.config.latent_channels
        if channels == latents:
            sd.unet.widen(2 * latents)
        elif channels != 2 * latents:
            raise ValueError(f"--model {self.options.model} takes {channels} channels: it cannot edit images")
        return super().build(sd)

    def dataset(self, source):
        from minisd.data import datasets

        o = self.options
        columns = {"image_column": o.edited_image_column, "pair_column": o.original_image_column}
        views = {"resolution": o.resolution, "center_crop": True, "squash": not o.center_crop}
        views |= {"random_flip": o.random_flip, "interpolation": "bicubic"}
        return datasets.EditPairs(source, caption_column=o.edit_prompt_column, **columns, **views)

    def dropped(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Which samples get no prompt, and which no original image, (b,) each: those with r < 2p, and with
        p <= r < 3p, for r uniform in [0, 1)."""
        import torch

        p = self.options.conditioning_dropout_prob or 0.0
        r = torch.stack([torch.rand((), generator=g) for g in self.generators("conditioning", batch)])
        return r < 2 * p, (r >= p) & (r < 3 * p)

    def inputs(self, batch: dict) -> dict:
        no_prompt, no_image = self.dropped(batch)
        prompts = ["" if drop else p for p, drop in zip(batch["prompt"], no_prompt, strict=True)]
        return super().inputs(batch | {"prompt": prompts, "has_image": ~no_image})

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        import torch

        original = self.sd.encode_original(batch["original"]) * batch["has_image"][:, None, None, None]
        inputs = torch.cat([noisy, original.to(noisy.dtype)], dim=1)  # (b, 2 c, h, w)
        return self.sd.unet(inputs, timesteps, **self.condition(batch))

    def read_validation_prompts(self) -> Prompts:
        from minisd.data import images

        o, flag = self.options, "--val_image_url"
        if not o.val_image_url:
            return []
        image = images.read_square(o.val_image_url, o.resolution, flag=flag, max_pixels=o.max_pixels)
        return [(o.validation_prompt, image)]

    def conditioning_image(self, view) -> Tensor:
        return self.data.extras(view)["original"]

    def sampling_kwargs(self, images: Tensor) -> dict:
        return {"init_images": images}
