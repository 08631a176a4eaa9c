"""Train the autoencoder on images alone: reconstruction and KL divergence (arXiv 1312.6114)."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from minisd.methods._base import Image, Method, Parameters, StableDiffusion, Tensor
from minisd.options import (
    Average,
    Dataset,
    Model,
    Optimizer,
    Precision,
    Run,
    ValidationImages,
    Weight,
    flag,
    require,
)


class Options(Dataset, Average, ValidationImages, Optimizer, Precision, Model, Run):
    """Autoencoder"""

    kl_weight: Weight = flag(2e-5, "weight of the mean KL divergence; 1e-3 kills channels of a small model")
    gradient_weight: Weight = flag(0.5, "weight of the absolute error of differences between adjacent pixels")
    l2_weight: Weight = flag(0.5, "weight of the squared error; that of the absolute error is 1")
    rescale_latents: bool = flag(
        False, "finally scale latents to a mean square of 1, after which a UNet has to be trained anew"
    )
    image_column: str = flag("image", "column of the images")
    random_flip: bool = flag(False, "flip images with probability 1/2")
    shard: str | None = flag(None, "refused: its memory is taken by activations", refused=True)
    num_validation_images: int = flag(8, "number of images shown beside their reconstructions")
    validation_steps: int | None = flag(500)
    output_dir: Path = flag(Path("sd-model-autoencoder"))

    def check(self):
        require(not self.compile, "--compile is for UNets, and this method trains none")


class Autoencoder(Method):
    """Trains the autoencoder. The result is the whole model, with the other parts as they were read."""

    def build(self, sd: StableDiffusion) -> Parameters:
        return self.unfreeze("vae", sd.vae)

    def inputs(self, batch: dict) -> dict:
        return self.send(batch | {"posterior": self.draw("posterior", batch, self.latent_shape(batch))})

    def loss_of(self, batch: dict) -> Tensor:
        """The weighted sum of the means of |e|, e^2, |difference of e between adjacent pixels| and the KL
        divergence, for the error e of the image decoded from a sample of the posterior."""
        from torch.utils.checkpoint import checkpoint

        o, vae, pixels = self.options, self.sd.vae, batch["pixels"]
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = again if o.gradient_checkpointing else lambda f, x: f(x)
        with self.autocast():
            mean, std = (t.float() for t in run(vae.encode, pixels))
            latents = mean + std * batch["posterior"]
            error = run(vae.decode, latents).float() - pixels  # (b, 3, h, w)
        mean, std = (t / vae.config.scaling_factor for t in (mean, std))
        kl = 0.5 * (mean.square() + std.square() - 1) - std.log()
        gradients = sum(error.diff(dim=d).abs().mean() for d in (-2, -1))
        reconstruction = error.abs().mean() + o.l2_weight * error.square().mean()
        return reconstruction + o.gradient_weight * gradients + o.kl_weight * kl.mean()

    def sample_pixels(self, count: int) -> Tensor:
        """At most `count` images, evenly spaced in the data, (n, 3, h, w)."""
        import torch

        from minisd.noise import generator

        indices = range(0, len(self.data), max(1, len(self.data) // count))[:count]
        examples = [self.data.examples(i, generator(self.options.seed, "some", i))[0] for i in indices]
        return torch.stack([self.data.pixels(e.view) for e in examples])

    def trained_on(self) -> list[Image]:
        """Those that `preview` reconstructs."""
        from minisd.data import images

        return list(map(images.to_pil, self.sample_pixels(self.options.num_validation_images)))

    def preview(self, moment: str = "") -> Image:
        """Reconstructed images; during training, below what they should be."""
        from minisd.data import images

        pixels = self.sample_pixels(self.options.num_validation_images)
        decoded = self.sd.decode(self.sd.encode_images(pixels)[0]).cpu().clamp(-1, 1)
        psnr = 10 * math.log10(4 / max((decoded - pixels).square().mean().item(), 1e-12))
        about = f"{moment}: " if moment else ""
        rows = [] if moment else [("pictures", self.trained_on())]
        rows.append((f"{about}reconstructed, {psnr:.1f} dB", [images.to_pil(p) for p in decoded]))
        return images.labelled_rows(rows)

    def save(self, folder: Path) -> None:
        vae = self.sd.vae
        if self.options.rescale_latents:
            parts = self.sample_pixels(1024).split(32)
            latents = [self.sd.encode_images(p)[0] / vae.config.scaling_factor for p in parts]
            square = sum(t.square().sum().item() for t in latents) / sum(t.numel() for t in latents)
            vae.config = replace(vae.config, scaling_factor=square**-0.5)
        super().save(folder)
