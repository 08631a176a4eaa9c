"""Make a model forget a concept, by its prompt and without images (ESD, arXiv 2303.07345)."""

from pathlib import Path
from typing import Literal

from minisd.methods._base import Parameters, StableDiffusion, Tensor
from minisd.methods._drawn import Drawn, DrawnLatents
from minisd.options import Positive, flag, require


class Options(Drawn):
    """Erasing"""

    erase: list[str] = flag(help="prompts of what is to go, such as 'van gogh'")
    train_method: Literal["xattn", "noxattn", "full"] = flag(
        "xattn",
        "cross-attention (ESD-x), for what goes when it is named; noxattn: all but that and the timestep's "
        "layers (ESD-u), for what goes unnamed, too; full: all",
    )
    negative_guidance: Positive = flag(1.0, "eta: how far to go from the concept")
    learning_rate: float = flag(1e-5)
    output_dir: Path = flag(Path("erased-model"))

    def check(self):
        require(all(map(str.strip, self.erase)), "--erase: an empty prompt leaves the model as it is")


class Erase(DrawnLatents):
    """The UNet learns to predict for the concept what the frozen one predicts away from it. What it trains on
    are latents that it draws itself for the concept, and so further and further from it."""

    def build(self, sd: StableDiffusion) -> Parameters:
        trained, kind = self.unfreeze_beside(sd), self.options.train_method
        for name in list(trained):
            cross, end = ".attn2." in name, name.startswith(("unet.time_embedding.", "unet.conv_out."))
            if {"xattn": not cross, "noxattn": cross or end, "full": False}[kind]:
                trained.pop(name).requires_grad_(False)
        return trained

    def prompts(self) -> list[str]:
        return self.options.erase

    def noisy_batch(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The target is e(x_t) - eta (e(x_t, c) - e(x_t)), where e is the frozen model (equation 5)."""
        noisy, timesteps = batch["noisy"], batch["timesteps"]
        concept, empty = self.predict_before(noisy, timesteps, batch["text"], self.empty)
        return noisy, timesteps, empty - self.options.negative_guidance * (concept - empty)
