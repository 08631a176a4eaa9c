"""Train a ControlNet, which steers a frozen model by pictures such as edges or poses (arXiv 2302.05543)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.methods._base import Method, Training
from minisd.options import Dataset, flag, require

if TYPE_CHECKING:
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
        self.chances("proportion_empty_prompts")
        pictures, prompts = len(self.validation_image), len(self.validation_prompt)
        require(
            pictures == prompts or (pictures and prompts and 1 in (pictures, prompts)),
            f"--validation_image has {pictures} and --validation_prompt {prompts}: "
            "as many of each, or one of either",
        )


class Method(Method):
    """Trains the ControlNet alone, in fp32; its gradient passes through the UNet's frozen decoder."""

    def insert(self, sd):
        import torch

        from minisd.adapters import controlnet
        from minisd.models.controlnet import ControlNet

        o = self.options
        if sd.unet.config.in_channels != sd.vae.config.latent_channels:
            raise ValueError(
                f"--model {o.model} takes {sd.unet.config.in_channels} channels, not latents alone"
            )
        if o.controlnet_model_name_or_path:
            self.controlnet = controlnet.load(
                o.controlnet_model_name_or_path,
                device=self.device,
                dtype=torch.float32,
                cache_dir=o.cache_dir,
            )
        else:
            torch.manual_seed(o.seed)
            self.controlnet = ControlNet.from_unet(sd.unet, sd.vae.config.downscale)
        return self.thaw("controlnet", self.controlnet)

    @property
    def parts(self):
        return self.sd.parts | {"controlnet": self.controlnet}

    def examples(self, source):
        from minisd.data import datasets

        o = self.options
        return datasets.Conditioned(
            source,
            resolution=o.resolution,
            center_crop=True,
            pair_column=o.conditioning_image_column,
            image_column=o.image_column,
            caption_column=o.caption_column,
            caption_dropout=o.proportion_empty_prompts,
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        context = self.condition(batch)["context"]
        hint = batch["conditioning"].to(self.device, noisy.dtype)
        residuals = self.controlnet(noisy, timesteps, context, hint)
        return self.sd.unet(noisy, timesteps, context, **residuals)

    def save(self, folder: Path) -> None:
        from minisd.adapters import controlnet

        controlnet.save(folder, self.controlnet)

    # Pictures

    def wanted(self) -> list[tuple[str, Tensor]]:
        from minisd.data import images

        o, flag = self.options, "--validation_image"
        count = max(len(o.validation_image), len(o.validation_prompt))
        names, prompts = (v * count if len(v) == 1 else v for v in (o.validation_image, o.validation_prompt))
        pictures = [images.read_square(name, o.resolution, flag=flag) for name in names]
        return list(zip(prompts, pictures, strict=True))

    def beside(self, view) -> Tensor:
        return 2 * self.data.extras(view)["conditioning"] - 1

    def steer(self, pictures: Tensor) -> dict:
        from minisd.sampling.guidance import Control

        return {"controls": [Control(network=self.controlnet, hint=pictures / 2 + 0.5)]}
