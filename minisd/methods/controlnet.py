"""Train a ControlNet, which conditions a frozen model on images such as edges or poses (arXiv 2302.05543)."""

import functools
from pathlib import Path

from minisd.methods._base import Method, Parameters, Prompts, StableDiffusion, Tensor
from minisd.options import Dataset, Probability, Training, flag, require


class Options(Dataset, Training):
    """ControlNet"""

    FEWEST = 3000
    DATA_HAS_SPLITS = True
    controlnet_model_name_or_path: str | None = flag(
        None, "initial ControlNet: a folder, a file or a hub id; by default a copy of the model's UNet"
    )
    image_column: str = flag("image", "column of the images")
    conditioning_image_column: str = flag("conditioning_image", "column of the conditioning images")
    caption_column: str = flag("text", "column of the captions; of several, one is drawn each time")
    proportion_empty_prompts: Probability = flag(0.0, "probability of an empty caption; 0.5 in the paper")
    validation_image: list[str] = flag([], "conditioning images to validate with", free=True)
    validation_prompt: list[str] = flag([], "their prompts; a single image or prompt goes with all others")
    tracker_project_name: str = flag("train_controlnet", "wandb's project")
    learning_rate: float = flag(5e-6)
    num_train_epochs: int = flag(1)
    output_dir: Path = flag(Path("controlnet-model"))

    def check(self):
        images, prompts = len(self.validation_image), len(self.validation_prompt)
        fitting = images == prompts or images and prompts and 1 in (images, prompts)
        counts = f"--validation_image has {images} and --validation_prompt {prompts}"
        require(fitting, f"{counts}: give as many of each, or one of either")


class ControlNet(Method):
    """Trains the ControlNet alone, in fp32; its gradient passes through the UNet's frozen decoder."""

    def build(self, sd: StableDiffusion) -> Parameters:
        import torch

        from minisd.adapters import controlnet
        from minisd.models import controlnet as networks

        o, channels = self.options, sd.unet.config.in_channels
        if channels != sd.vae.config.latent_channels:
            raise ValueError(f"--model {o.model} takes {channels} channels, not latents alone")
        if source := o.controlnet_model_name_or_path:
            precision = {"device": self.device, "dtype": torch.float32}
            self.controlnet = controlnet.load(source, cache_dir=o.cache_dir, **precision)
        else:
            torch.manual_seed(o.seed)
            self.controlnet = networks.ControlNet.from_unet(sd.unet, sd.vae.config.downscale)
        return self.unfreeze("controlnet", self.controlnet)

    def dataset(self, source):
        from minisd.data import datasets

        o = self.options
        columns = {"image_column": o.image_column, "pair_column": o.conditioning_image_column}
        captions = {"caption_column": o.caption_column, "caption_dropout": o.proportion_empty_prompts}
        return datasets.Conditioned(source, resolution=o.resolution, center_crop=True, **columns, **captions)

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        context = self.condition(batch)["context"]
        residuals = self.controlnet(noisy, timesteps, context, batch["conditioning"].to(noisy.dtype))
        return self.sd.unet(noisy, timesteps, context, **residuals)

    def save(self, folder: Path) -> None:
        from minisd.formats import diffusers

        diffusers.save_part(folder, self.controlnet)

    def read_validation_prompts(self) -> Prompts:
        from minisd.data import images

        o, flag = self.options, "--validation_image"
        count = max(len(o.validation_image), len(o.validation_prompt))
        paths, prompts = (v * count if len(v) == 1 else v for v in (o.validation_image, o.validation_prompt))
        read = functools.partial(images.read_square, flag=flag, max_pixels=o.max_pixels)
        hints = [read(path, o.resolution) for path in paths]
        return list(zip(prompts, hints, strict=True))

    def conditioning_image(self, view) -> Tensor:
        return 2 * self.data.extras(view)["conditioning"] - 1

    def sampling_kwargs(self, images: Tensor) -> dict:
        from minisd.sampling.generate import Control

        return {"controls": [Control(network=self.controlnet, hint=images / 2 + 0.5)]}
