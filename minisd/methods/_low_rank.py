"""What the methods share that train low-rank updates beside a frozen model (LoRA, arXiv 2106.09685)."""

from pathlib import Path
from typing import Literal

from minisd import reading
from minisd.methods._base import Method, StableDiffusion
from minisd.options import Count, Group, Positive, flag


class Updates(Group):
    """Low-rank updates"""

    rank: Count | None = flag(None, "rank of the updates; 4 by default")
    alpha: Positive | None = flag(None, "an update is scaled by alpha / rank; by default the rank")
    target_modules: list[str] = flag(
        [],
        "attention (default), feed_forward, projections, resnet, or ends of names such as attn2.to_k",
        also=("target",),
    )
    save_format: Literal["diffusers", "diffusers-0.16", "kohya"] = flag(
        "diffusers", "diffusers-0.16 is what that release reads; kohya what A1111 and ComfyUI read"
    )


class LowRank(Method):
    """Trains `updates`, A and B of layers by their names, in fp32; everything else is frozen."""

    def insert(self, sd: StableDiffusion, *, text_encoder: bool = False, dropout: float = 0.0) -> None:
        """Add new updates of the UNet, and of the text encoder if asked, by the flags."""
        from minisd.adapters import lora

        o, networks, rank = self.options, lora.networks(sd), self.options.rank or 4
        if not text_encoder:
            del networks["text_encoder"]
        targets = o.target_modules or ["attention"]
        self.updates = lora.insert(networks, targets, rank, o.alpha or rank, dropout)

    def describe(self) -> str:
        from minisd.adapters import lora

        return f"{lora.describe(self.updates)}\n{super().describe()}"

    def save(self, folder: Path) -> None:
        from minisd.adapters import lora

        path = folder / "pytorch_lora_weights.safetensors"
        lora.save(path, self.updates, self.options.save_format, self.metadata())

    def metadata(self) -> dict[str, str]:
        """How the LoRA was trained, by the names of kohya's files, which A1111 shows."""
        o, kind = self.options, self.sd.schedule.prediction_type
        side, title = f"{o.resolution}x{o.resolution}", reading.real(o.output_dir).name
        recorded = {
            "output_name": title, "sd_model_name": self.sd.name, "resolution": side,
            "optimizer": o.optimizer or "AdamW", "batch_size_per_device": o.train_batch_size,
            "num_epochs": o.num_train_epochs,
            "min_snr_gamma": getattr(o, "snr_gamma", None), "clip_skip": None, "seed": o.seed,
            "learning_rate": o.learning_rate, "text_encoder_lr": getattr(o, "text_encoder_lr", None),
            "lr_scheduler": o.lr_scheduler,
            "lr_warmup_steps": o.lr_warmup_steps, "max_train_steps": o.max_train_steps,
            "gradient_accumulation_steps": o.gradient_accumulation_steps,
            "mixed_precision": o.mixed_precision, "noise_offset": getattr(o, "noise_offset", None),
        }  # fmt: skip
        return {f"ss_{name}": str(value) for name, value in recorded.items()} | {
            "modelspec.title": title,
            "modelspec.resolution": side,
            "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
        }
