"""Train low-rank updates beside a frozen model, on captions or as DreamBooth (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minisd.methods._base import Training
from minisd.methods._prior import Method
from minisd.options import Captions, DeepFloyd, Prior, flag, require

# Defaults that follow the kind of data: captioned, DreamBooth.
BY_KIND = {
    "learning_rate": (1e-4, 5e-4),
    "train_batch_size": (16, 4),
    "num_train_epochs": (100, 1),
    "output_dir": (Path("sd-model-finetuned-lora"), Path("lora-dreambooth-model")),
}


@dataclass(kw_only=True)
class Options(Captions, Prior, DeepFloyd, Training):
    """LoRA"""

    instance_prompt: str | None = flag(None, "the prompt of pictures without a caption: trains as DreamBooth")
    rank: int | None = flag(None, "rank of the updates; 4 by default, or that of --init_lora")
    alpha: float | None = flag(None, "an update counts alpha / rank; the rank by default")
    target: list[str] = flag(
        [],
        "layers: attention (default), feed_forward, projections, resnet, or ends of names such as attn2.to_k",
    )
    lora_dropout: float = flag(0.0, "chance that an input of an update is left out")
    train_text_encoder: bool = flag(False, "train updates of the text encoder as well")
    init_lora: Path | None = flag(None, "begin with the LoRA in this file: its layers, ranks and alphas")
    save_format: Literal["diffusers", "kohya"] = flag("diffusers", "kohya is what A1111 and ComfyUI read")
    learning_rate: float | None = flag(None, "peak learning rate; 1e-4, as DreamBooth 5e-4")
    train_batch_size: int | None = flag(None, "images in a forward pass on one device; 16, as DreamBooth 4")
    num_train_epochs: int | None = flag(
        None, "passes over the data, if --max_train_steps is not given; 100 or 1"
    )
    validation_epochs: int | None = flag(
        None, "draw every so many epochs; 1, as DreamBooth 50, unless --validation_steps is given"
    )
    output_dir: Path | None = flag(None, "sd-model-finetuned-lora, as DreamBooth lora-dreambooth-model")

    def check(self):
        dreambooth = self.instance_prompt is not None
        for name, defaults in BY_KIND.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[dreambooth])
        self.drawn_every = "validation_epochs", 50 if dreambooth else 1
        require(dreambooth or not self.with_prior_preservation,
                "--with_prior_preservation needs --instance_prompt")  # fmt: skip
        require(not dreambooth or self.data, "--instance_prompt needs --data, a folder of pictures")
        self.positive("rank", "alpha")
        for name in ("rank", "alpha", "target"):
            both = getattr(self, name) and self.init_lora
            require(not both, f"--{name} is that of --init_lora: leave one of them out")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must be from 0 to below 1")


class Method(Method):
    """Trains A and B of each targeted layer, in fp32; everything else is frozen."""

    def insert(self, sd):
        from minisd.adapters import lora

        o, rank = self.options, self.options.rank or 4
        if o.init_lora:
            self.updates, source = lora.load(sd, o.init_lora, o.lora_dropout), f"--init_lora {o.init_lora}"
        else:
            networks, source = lora.networks(sd), f"--target {' '.join(o.target)}"
            if not o.train_text_encoder:
                del networks["text_encoder"]
            targets = o.target or ["attention"]
            self.updates = lora.insert(networks, targets, rank, o.alpha or rank, o.lora_dropout)
        # A file's updates of the text encoder stay as they are, and are saved with the others.
        trained = {n: u for n, u in self.updates.items() if o.train_text_encoder or n.startswith("unet.")}
        if o.train_text_encoder and not any(n.startswith("text_encoder.") for n in trained):
            raise ValueError(f"--train_text_encoder: {source} has no layer of the text encoder")
        if not trained:
            raise ValueError(f"{source} has no layer of the UNet; --train_text_encoder trains it")
        return {f"{n}.{k}": p.requires_grad_() for n, u in trained.items() for k, p in u.named_parameters()}

    def describe(self) -> str:
        from minisd.adapters import lora

        return f"{lora.describe(self.updates)}\n{super().describe()}"

    def save(self, folder: Path) -> None:
        from minisd.adapters import lora
        from minisd.formats import lora_names

        about = lora_names.about(self.options, folder.resolve().name, self.sd)
        path = folder / "pytorch_lora_weights.safetensors"
        lora.save(path, self.updates, self.options.save_format, about)
