"""Train the whole UNet to edit a picture as a sentence says (InstructPix2Pix, arXiv 2211.09800)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.methods._base import Method, Training
from minisd.options import Average, Dataset, flag, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Options(Dataset, Average, Training):
    """InstructPix2Pix"""

    original_image_column: str = flag("input_image", "column of the pictures before the edit")
    edited_image_column: str = flag("edited_image", "column of the pictures after it")
    edit_prompt_column: str = flag("edit_prompt", "column of what was asked for")
    random_flip: bool = flag(False, "flip both pictures of a pair with probability 1/2")
    conditioning_dropout_prob: float | None = flag(
        None, "chance p that the prompt alone is left out, that both are, and that the picture alone is; 0.05"
    )
    val_image_url: str | None = flag(None, "picture to edit by --validation_prompt: an address or a path")
    revision: str | None = flag(None, "branch, tag or commit of a hub id", also=("non_ema_revision",))
    validation_guidance_scale: float = flag(7.0)
    validation_epochs: int | None = flag(
        None, "draw every so many epochs; 1, unless --validation_steps is given"
    )
    resolution: int = flag(256)
    train_batch_size: int = flag(16)
    learning_rate: float = flag(1e-4)
    output_dir: Path = flag(Path("instruct-pix2pix-model"))

    drawn_every = "validation_epochs", 1

    def check(self):
        p = self.conditioning_dropout_prob
        require(p is None or 0 <= p <= 1 / 3, "--conditioning_dropout_prob must be from 0 to 1/3")
        both = bool(self.val_image_url) == bool(self.validation_prompt)
        require(both, "--val_image_url and --validation_prompt go together: give both or neither")


class Method(Method):
    """The UNet gets the latents of the original beside the noisy ones of the edited picture."""

    def insert(self, sd):
        latents = sd.vae.config.latent_channels
        if sd.unet.config.in_channels == latents:
            sd.unet.widen(2 * latents)
        elif sd.unet.config.in_channels != 2 * latents:
            channels = f"takes {sd.unet.config.in_channels} channels"
            raise ValueError(f"--model {self.options.model} {channels}: it is for another use")
        return super().insert(sd)

    def examples(self, source):
        from minisd.data import datasets

        o = self.options
        return datasets.EditPairs(
            source,
            resolution=o.resolution,
            squash=not o.center_crop,
            center_crop=True,
            random_flip=o.random_flip,
            interpolation="bicubic",
            image_column=o.edited_image_column,
            caption_column=o.edit_prompt_column,
            pair_column=o.original_image_column,
        )

    def dropped(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Whose prompt and whose original is left out, (b,) each. With r uniform in [0, 1): the prompt where
        r < 2p, the original where p <= r < 3p."""
        import torch

        from minisd.noise import generator

        p = self.options.conditioning_dropout_prob or 0.0
        streams = [generator(self.options.seed, "conditioning", n) for n in batch["number"]]
        r = torch.stack([torch.rand((), generator=g) for g in streams])
        return r < 2 * p, (r >= p) & (r < 3 * p)

    def condition(self, batch: dict) -> dict:
        without = self.dropped(batch)[0].tolist()
        prompts = ["" if drop else prompt for prompt, drop in zip(batch["prompt"], without, strict=True)]
        return {"context": self.frozen_context(prompts)}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        import torch

        original = self.sd.encode_original(batch["original"])  # (b, c, h, w)
        kept = ~self.dropped(batch)[1].to(original.device)
        inputs = torch.cat([noisy, (original * kept[:, None, None, None]).to(noisy.dtype)], dim=1)
        return self.sd.unet(inputs, timesteps, **self.condition(batch))

    # Pictures

    def wanted(self) -> list[tuple[str, Tensor]]:
        from minisd.data import images

        o, flag = self.options, "--val_image_url"
        if not o.val_image_url:
            return []
        return [(o.validation_prompt, images.read_square(o.val_image_url, o.resolution, flag=flag))]

    def beside(self, view) -> Tensor:
        return self.data.extras(view)["original"]

    def steer(self, pictures: Tensor) -> dict:
        return {"originals": pictures}
