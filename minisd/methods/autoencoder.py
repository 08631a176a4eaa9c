"""Train the autoencoder on pictures alone: reconstruction and KL (arXiv 1312.6114)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.methods._base import Method
from minisd.options import Average, Dataset, Model, Optimizer, Precision, Run, flag, require

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(kw_only=True)
class Options(Dataset, Average, Optimizer, Precision, Model, Run):
    """Autoencoder"""

    kl_weight: float = flag(
        2e-5, "of the mean KL divergence of a latent; 1e-3 kills a small model's channels"
    )
    gradient_weight: float = flag(0.5, "of the absolute error of differences between neighbouring pixels")
    l2_weight: float = flag(0.5, "of the squared error, beside 1 for the absolute one")
    rescale_latents: bool = flag(
        False, "in the end scale the latents to a mean square of 1: any UNet must learn anew"
    )
    image_column: str = flag("image", "column of the pictures")
    random_flip: bool = flag(False, "flip pictures with probability 1/2")
    num_validation_images: int = flag(8, "pictures that are shown beside their reconstructions")
    validation_steps: int = flag(500, "show them every so many updates")
    validation_epochs: int | None = flag(None, "show them every so many epochs instead")
    output_dir: Path = flag(Path("sd-model-autoencoder"))

    def check(self):
        diffusion = "snr_gamma noise_offset input_perturbation prediction_type rescale_betas_zero_snr"
        for name in diffusion.split():
            require(not getattr(self, name), f"--{name} is of diffusion: an autoencoder has none")
        for name in ("kl_weight", "gradient_weight", "l2_weight"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")
        self.positive("num_validation_images", "validation_steps", "validation_epochs")


class Method(Method):
    """Trains the part `vae`; the folder that it leaves is the whole model, the other parts as they were."""

    validates = True

    def wanted(self):
        return []

    def insert(self, sd) -> dict[str, torch.nn.Parameter]:
        return self.thaw("vae", sd.vae)

    def examples(self, source):
        return self.uncaptioned(source)

    def loss(self, batch: dict) -> Tensor:
        """The mean over the batch of |e| + e^2 + |difference of e between neighbours| + KL, as weighted, for
        the error e of the picture that a draw from the posterior becomes."""
        from torch.utils.checkpoint import checkpoint

        o, vae = self.options, self.sd.vae
        pixels = batch["pixels"].to(self.device)

        run = partial(checkpoint, use_reentrant=False) if o.gradient_checkpointing else lambda f, x: f(x)
        with self.autocast():
            mean, std = (t.float() for t in run(vae.encode, pixels))
            latents = mean + std * self.draw("posterior", batch, mean.shape[1:])
            error = run(vae.decode, latents).float() - pixels  # (b, 3, h, w)
        mean, std = (t / vae.config.scaling_factor for t in (mean, std))
        kl = 0.5 * (mean.square() + std.square() - 1) - std.log()
        steps = sum(error.diff(dim=d).abs().mean() for d in (-2, -1))
        off = error.abs().mean() + o.l2_weight * error.square().mean()
        return off + o.gradient_weight * steps + o.kl_weight * kl.mean()

    def some(self, count: int) -> Tensor:
        """Pictures from all over the data (n, 3, h, w)."""
        import torch

        from minisd.noise import generator

        places = range(0, len(self.data), max(1, len(self.data) // count))[:count]
        examples = [self.data.examples(i, generator(self.options.seed, "some", i))[0] for i in places]
        return torch.stack([self.data.pixels(e.view) for e in examples])

    def validation(self) -> Image.Image:
        """Pictures, and what they are after encoding and decoding."""
        from minisd.data import images

        pixels = self.some(self.options.num_validation_images)
        decoded = self.sd.decode(self.sd.encode_images(pixels)[0]).cpu().clamp(-1, 1)
        noise = 10 * math.log10(4 / max((decoded - pixels).square().mean().item(), 1e-12))
        rows = ("pictures", pixels), (f"reconstructed, {noise:.1f} dB", decoded)
        return images.labelled_rows([(label, [images.to_pil(p) for p in row]) for label, row in rows])

    result = validation

    def save(self, folder: Path) -> None:
        vae = self.sd.vae
        if self.options.rescale_latents:
            parts = self.some(1024).split(32)
            latents = [self.sd.encode_images(p)[0] / vae.config.scaling_factor for p in parts]
            square = sum(t.square().sum().item() for t in latents) / sum(t.numel() for t in latents)
            vae.config = replace(vae.config, scaling_factor=square**-0.5)
        super().save(folder)
