"""Bind a rare word to the subject of a few images by training the UNet (DreamBooth, arXiv 2208.12242)."""

from pathlib import Path

from minisd.methods._prior import PriorPreservation, Subject
from minisd.options import Average, Training, flag


class Options(Subject, Average, Training):
    """DreamBooth"""

    FEWEST = 200
    instance_prompt: str = flag()
    skip_save_text_encoder: bool = flag(False, "accepted: an untrained text encoder is saved as it was read")
    offset_noise: bool = flag(False, "the same as --noise_offset 0.1")
    learning_rate: float = flag(5e-6)
    num_train_epochs: int = flag(1)
    output_dir: Path = flag(Path("dreambooth-model"))

    def check(self):
        if self.offset_noise and not self.noise_offset:
            self.noise_offset = 0.1


class DreamBooth(PriorPreservation):
    """Trains the whole UNet, and with --train_text_encoder the text encoder."""
