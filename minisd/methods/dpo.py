"""Train a model towards the preferred images of pairs (Diffusion-DPO, arXiv 2311.12908)."""

from pathlib import Path

from minisd.methods._base import Tensor
from minisd.methods._reference import Reference, Tuned
from minisd.options import Captions, Positive, Training, flag


class Options(Captions, Tuned, Training):
    """Preferences"""

    image_column: str = flag("image", "column of the preferred images, or of the first of each pair")
    rejected_image_column: str = flag("rejected_image", "column of the rejected images, or of the second")
    label_column: str | None = flag(
        None, "column with 1 where the first image is preferred, 0 where the second is, 0.5 for neither"
    )
    beta_dpo: Positive = flag(5000.0, "how strongly the model is held to the one before training")
    train_text_encoder: bool = flag(
        False, "refused: the model before training has the same text encoder", refused=True
    )
    train_batch_size: int = flag(4, "pairs in one forward pass on one device")
    learning_rate: float = flag(1e-5)
    output_dir: Path = flag(Path("dpo-model"))


class DPO(Reference):
    """A pair's images have one noise, timestep and crop. The model learns to lower the error of the preferred
    one, against that of the frozen model, by more than the rejected one's: no reward is trained."""

    def dataset(self, source):
        from minisd.data.datasets import Preferences

        o = self.options
        columns = {"pair_column": o.rejected_image_column, "label_column": o.label_column}
        return super().dataset(source, kind=Preferences, **columns)

    def generators(self, name: str, batch: dict) -> list:
        """Those of the first images of the pairs, and the same for the second ones."""
        numbers = batch["number"]
        return super().generators(name, batch | {"number": 2 * numbers[: len(numbers) // 2]})

    def loss_of(self, batch: dict) -> Tensor:
        """Equation 14. As in the authors' code, beta T omega(lambda_t) is half of --beta_dpo, and a norm is a
        mean over the latents; --snr_gamma is a further weight of the timestep."""
        from torch.nn.functional import logsigmoid

        noisy, timesteps, target = self.noisy_batch(batch)
        errors = self.errors(self.predict_noisy(noisy, timesteps, batch), target, batch)
        (before,) = self.predict_before(noisy, timesteps, batch["text"])
        change = (errors - self.errors(before, target, batch)) * self.weights(timesteps)  # (2 pairs,)
        preferred, rejected = change.chunk(2)
        return -logsigmoid(-self.options.beta_dpo / 2 * (preferred - rejected)).mean()
