"""Train on which of two images people prefer (Diffusion-DPO, arXiv 2311.12908)."""

from pathlib import Path

from minisd.methods._base import Captioned, Source, Tensor
from minisd.methods._reference import Reference, Tuned
from minisd.options import Dataset, Training, flag


class Options(Dataset, Tuned, Training):
    """Preferences"""

    image_column: str = flag("image", "column of the preferred images")
    rejected_column: str = flag("rejected", "column of the images that lost against them")
    caption_column: str = flag("text", "column of the captions; of several, one is drawn each time")
    random_flip: bool = flag(False, "flip both images of a pair with probability 1/2")
    beta_dpo: float = flag(
        5000.0, "beta: how near to the model before training it stays; 2000 to 5000 in the paper"
    )
    learning_rate: float = flag(1e-5)
    output_dir: Path = flag(Path("dpo-model"))

    def check(self):
        self.positive("beta_dpo")


class DPO(Reference):
    """The error of the preferred image has to fall by more, against the model before training, than that of
    the other one, for the same noise and timestep."""

    def dataset(self, source: Source) -> Captioned:
        from minisd.data import datasets

        o = self.options
        columns = {"image_column": o.image_column, "pair_column": o.rejected_column}
        views = {"resolution": o.resolution, "center_crop": o.center_crop, "random_flip": o.random_flip}
        return datasets.Preferences(source, caption_column=o.caption_column, **columns, **views)

    def inputs(self, batch: dict) -> dict:
        # The second image of sample 7 has the number 7+1; it gets the draws of 7.
        return super().inputs(batch | {"number": [str(n).partition("+")[0] for n in batch["number"]]})

    def loss_of(self, batch: dict) -> Tensor:
        """Equation 14, with beta / 2 for its beta T, as in the authors' code: errors are means, not sums."""
        import torch.nn.functional as F

        noisy, timesteps, target = self.noisy_batch(batch)
        pred = self.predict_noisy(noisy, timesteps, batch)
        (before,) = self.predict_before(noisy, timesteps, batch["text"])
        change = self.errors(pred, target, batch) - self.errors(before, target, batch)
        preferred, rejected = (self.weights(timesteps) * change).chunk(2)  # (b,) each
        return -F.logsigmoid(-self.options.beta_dpo / 2 * (preferred - rejected)).mean()
