"""Train low-rank updates beside a frozen model, on captions or as DreamBooth (LoRA, arXiv 2106.09685)."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from minisd.methods._base import Parameters, StableDiffusion
from minisd.methods._low_rank import LowRank, Updates
from minisd.methods._prior import PriorPreservation, Subject
from minisd.options import Rate, Training, flag, require


def by_kind(captioned: Any, dreambooth: Any, help: str) -> Any:
    """A flag with one default for captioned images, and another one with --instance_prompt."""
    help = f"{help}by default {captioned}, or {dreambooth} with --instance_prompt"
    return flag(None, help, by_kind=(captioned, dreambooth))


class Options(Updates, Subject, Training):
    """LoRA"""

    NEEDS = {"instance_prompt": "with_prior_preservation"}
    FEWEST = 200
    instance_prompt: str | None = flag(None, "prompt of images without a caption; trains as DreamBooth")
    train_text_encoder: bool = flag(False, "train updates of the text encoder as well")
    rank: int | None = flag(None, "rank of the updates; 4 by default, or that of --init_lora")
    lora_dropout: Rate = flag(0.0, "dropout probability of the updates' inputs")
    init_lora: Path | None = flag(None, "initial LoRA file, which sets layers, ranks and alphas")
    learning_rate: float | None = by_kind(1e-4, 5e-4, "peak learning rate; ")
    train_batch_size: int | None = by_kind(16, 4, "images in a forward pass on one device; ")
    num_train_epochs: int | None = by_kind(100, 1, "passes over the data; ")
    validation_steps: int | None = flag(None)
    validation_epochs: int | None = flag(
        None, "epochs between validations; by default 1, or 50 with --instance_prompt"
    )
    output_dir: Path | None = by_kind(Path("sd-model-finetuned-lora"), Path("lora-dreambooth-model"), "")

    def check(self):
        dreambooth = self.instance_prompt is not None
        for f in fields(self):
            if "by_kind" in f.metadata and getattr(self, f.name) is None:
                setattr(self, f.name, f.metadata["by_kind"][dreambooth])
        if self.validation_steps is None and self.validation_epochs is None:
            self.validation_epochs = 50 if dreambooth else 1
        require(not dreambooth or self.data, "--instance_prompt needs --data, a folder of images")
        for name in ("rank", "alpha", "target_modules"):
            both = self.init_lora and getattr(self, name)
            require(not both, f"--{name} is set by --init_lora: leave one of them out")
        other = self.init_lora or self.train_text_encoder or self.target_modules not in ([], ["attention"])
        other = other and self.save_format == "diffusers-0.16"
        require(not other, "--save_format diffusers-0.16 is for all of the UNet's attention, no more")


class LoRA(LowRank, PriorPreservation):
    """Trains A and B of each targeted layer, in fp32; everything else is frozen."""

    def build(self, sd: StableDiffusion) -> Parameters:
        from minisd.adapters import lora

        o = self.options
        if o.init_lora:
            self.updates, origin = lora.load(sd, o.init_lora, o.lora_dropout), f"--init_lora {o.init_lora}"
        else:
            origin = f"--target_modules {' '.join(o.target_modules)}"
            self.insert(sd, text_encoder=o.train_text_encoder, dropout=o.lora_dropout)
        # Without --train_text_encoder, a file's updates of the text encoder are saved unchanged.
        trained = {n: u for n, u in self.updates.items() if o.train_text_encoder or n.startswith("unet.")}
        if o.train_text_encoder and not any(n.startswith("text_encoder.") for n in trained):
            raise ValueError(f"--train_text_encoder: {origin} has no layer of the text encoder")
        require(trained, f"{origin} has no layer of the UNet; --train_text_encoder trains it")
        return {f"{n}.{k}": p.requires_grad_() for n, u in trained.items() for k, p in u.named_parameters()}
