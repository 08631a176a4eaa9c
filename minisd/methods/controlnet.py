"""Train a ControlNet, which steers a frozen model by pictures such as edges or poses (arXiv 2302.05543)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.config import Dataset, flag, require
from minisd.methods._base import Method, Training

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(kw_only=True)
class Options(Dataset, Training):
    """ControlNet"""

    controlnet_model_name_or_path: str | None = flag(
        None, "go on from this ControlNet: a folder, a file or a hub id; from the model's UNet by default"
    )
    image_column: str = flag("image", "column of the pictures")
    conditioning_image_column: str = flag("conditioning_image", "column of what steers them")
    caption_column: str = flag("text", "column of the captions; of several in a row one is drawn each time")
    proportion_empty_prompts: float = flag(0.0, "chance that a caption is left out; 0.5 in the paper")
    validation_image: list[str] = flag([], "control pictures to draw by while training")
    validation_prompt: list[str] = flag([], "their prompts; one picture or one prompt goes with all others")
    tracker_project_name: str = flag("train_controlnet", "wandb's project")
    set_grads_to_none: bool = flag(False, "accepted: they always are")
    learning_rate: float = flag(5e-6)
    num_train_epochs: int = flag(1)
    output_dir: Path = flag(Path("controlnet-model"))

    def check(self):
        require(0 <= self.proportion_empty_prompts <= 1, "--proportion_empty_prompts must be from 0 to 1")
        pictures, prompts = len(self.validation_image), len(self.validation_prompt)
        require(
            pictures == prompts or (pictures and prompts and 1 in (pictures, prompts)),
            f"--validation_image has {pictures} and --validation_prompt {prompts}: "
            "as many of each, or one of either",
        )


class Method(Method):
    """Trains the ControlNet alone, in fp32; its gradient passes through the UNet's frozen decoder."""

    def build(self) -> dict[str, torch.nn.Parameter]:
        import torch

        from minisd.adapters import control
        from minisd.models.controlnet import ControlNet

        o = self.options
        self.asked = self.pairs_of_flags()
        self.sd = sd = self.load()
        if sd.unet.config.in_channels != sd.vae.config.latent_channels:
            raise ValueError(
                f"--model {o.model} takes {sd.unet.config.in_channels} channels, not latents alone"
            )
        if o.controlnet_model_name_or_path:
            self.controlnet = control.load(
                o.controlnet_model_name_or_path,
                device=self.device,
                dtype=torch.float32,
                cache_dir=o.cache_dir,
            )
        else:
            torch.manual_seed(o.seed)
            self.controlnet = ControlNet.from_unet(sd.unet, sd.vae.config.downscale)
        if o.gradient_checkpointing:
            sd.unet.enable_gradient_checkpointing()
        return self.thaw("controlnet", self.controlnet)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        return self.sd.parts | {"controlnet": self.controlnet}

    def dataset(self):
        from minisd.data import pairs, sources

        o = self.options
        self.data = pairs.Conditioned(
            sources.from_options(o),
            resolution=o.resolution,
            conditioning_column=o.conditioning_image_column,
            image_column=o.image_column,
            caption_column=o.caption_column,
            caption_dropout=o.proportion_empty_prompts,
        )
        return self.data

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        context = self.condition(batch)["context"]
        hint = batch["conditioning"].to(self.device, noisy.dtype)
        residuals = self.controlnet(noisy, timesteps, context, hint)
        return self.sd.unet(noisy, timesteps, context, **residuals)

    def save(self, folder: Path) -> None:
        from minisd.adapters import control

        control.save(folder, self.controlnet)

    # Pictures

    def pairs_of_flags(self) -> list[tuple[str, Tensor]]:
        """The prompts and control pictures (3, h, w) in [0, 1] that the flags name."""
        from minisd.data import images

        o = self.options
        count = max(len(o.validation_image), len(o.validation_prompt))
        names, prompts = (v * count if len(v) == 1 else v for v in (o.validation_image, o.validation_prompt))
        pictures = [images.center_square(images.open_image(Path(name))) for name in names]
        hints = [images.to_tensor(p.resize((o.resolution, o.resolution))) / 2 + 0.5 for p in pictures]
        return list(zip(prompts, hints, strict=True))

    @property
    def validates(self) -> bool:
        return bool(self.asked)

    def validation(self) -> Image.Image:
        return self.rows(self.asked)

    def result(self) -> Image.Image:
        """By the flags' control pictures, or else by the first of the data."""
        from minisd.noise import generator

        example = self.data.examples(0, generator(self.options.seed, "result"))[0]
        return self.rows(self.asked or [(example.prompt, self.data.extras(example.view)["conditioning"])])

    def rows(self, pairs: list[tuple[str, Tensor]]) -> Image.Image:
        """A row for each pair: the control picture, then what is drawn by it."""
        from minisd.data import images
        from minisd.guidance import Control

        rows = []
        for prompt, hint in pairs:
            hints = hint.expand(self.options.num_validation_images, -1, -1, -1)  # (n, 3, h, w)
            drawn = self.samples(prompt, controls=[Control(network=self.controlnet, hint=hints)])
            rows.append((prompt, [images.to_pil(2 * hint - 1), *drawn]))
        return images.labelled_rows(rows)
