"""Distil a model that draws in a few steps (latent consistency, arXiv 2310.04378; LCM-LoRA, 2311.05556)."""

from pathlib import Path

from minisd.methods._base import Tensor
from minisd.methods._reference import Reference, Tuned
from minisd.options import Captions, Positive, Training, flag, require


class Options(Captions, Tuned, Training):
    """Latent consistency"""

    w_min: float = flag(5.0, "least weight w of the guidance that is distilled: --guidance_scale is 1 + w")
    w_max: float = flag(15.0, "largest w; it is drawn for each image between the two")
    huber_c: Positive = flag(0.001, "c of the pseudo-Huber distance sqrt(d^2 + c^2) - c")
    train_text_encoder: bool = flag(
        False, "refused: the guidance that is distilled is that of one text encoder", refused=True
    )
    validation_guidance_scale: float = flag(1.0)
    validation_scheduler: str = flag("lcm")
    learning_rate: float = flag(1e-4)
    output_dir: Path = flag(Path("lcm-model"))

    def check(self):
        require(-1 <= self.w_min <= self.w_max, "--w_min must be from -1 to --w_max")


class LCM(Reference):
    """f(x_t, t) is the x_0 to which the network jumps from x_t. It is trained to agree with itself a step
    earlier on the teacher's path, that is, on DDIM's with guidance (2310.04378, algorithm 1)."""

    preview_steps = 4

    @property
    def apart(self) -> int:
        """The number of timesteps that a step of the teacher takes (section 4.3: skipping steps)."""
        from minisd.schedulers.lcm import SETTINGS, spacing

        return spacing(self.sd.schedule.num_train_timesteps, SETTINGS["original_inference_steps"])

    def timesteps(self, batch: dict) -> Tensor:
        """(b,) uniform over those that the sampler takes its steps from."""
        return super().timesteps(batch) // self.apart * self.apart + self.apart - 1

    def inputs(self, batch: dict) -> dict:
        import torch

        o = self.options
        w = torch.stack([torch.rand((), generator=g) for g in self.generators("guidance", batch)])
        return super().inputs(batch) | self.send({"w": o.w_min + (o.w_max - o.w_min) * w})

    def noisy_batch(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t, and the target: f at the teacher's next point, without gradients. The target network is the
        trained one itself, that is, its moving average has a decay of 0 (arXiv 2310.14189, section 3.2)."""
        import torch

        noisy, timesteps, _ = super().noisy_batch(batch)
        with torch.no_grad():
            after = (timesteps - self.apart).clamp(min=0)
            target = self.predict_noisy(self.teacher_step(noisy, timesteps, after, batch), after, batch)
        return noisy, timesteps, target

    def teacher_step(self, x: Tensor, timesteps: Tensor, after: Tensor, batch: dict) -> Tensor:
        """One step of DDIM by the teacher, with guidance (equations 13 and 14)."""
        text, empty = self.predict_before(x, timesteps, batch["text"], self.empty)
        guided = text + batch["w"].view(-1, 1, 1, 1) * (text - empty)
        return self.sd.schedule.ddim(guided, x, timesteps, after)

    def predict_noisy(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """f(x_t, t) (equation 9, with the c_skip and c_out of section 4.1), in fp32."""
        from minisd.schedulers.lcm import SETTINGS, consistency

        pred, schedule = super().predict_noisy(noisy, timesteps, batch), self.sd.schedule
        denoised, _ = schedule.split(pred, noisy, schedule.shaped(timesteps, noisy))
        return consistency(noisy, denoised, timesteps.view(-1, 1, 1, 1), SETTINGS["timestep_scaling"])

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """The pseudo-Huber distance of each sample, in fp32: (b, c, h, w) -> (b,)."""
        c = self.options.huber_c
        return self.mean(((pred - target).square() + c**2).sqrt() - c, batch)
