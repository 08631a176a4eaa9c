"""What the methods share that need no images: the model draws the latents that it trains on."""

from collections.abc import Callable

from minisd.methods._base import Captioned, Tensor
from minisd.methods._reference import Reference
from minisd.options import Count, Model, Optimizer, Precision, Run, Side, Validation, flag, require

Predict = Callable[..., tuple[Tensor, ...]]


class Drawn(Validation, Optimizer, Precision, Model, Run):
    """Latents that the model draws

    And the groups of all methods that start from a Stable Diffusion model and need no images.
    """

    resolution: Side = flag(512, "side of the images in pixels, a multiple of 8")
    ddim_steps: Count = flag(50, "steps of an image, at one of which, drawn at random, each sample stops")
    start_guidance: float = flag(3.0, "guidance scale of drawing")
    max_train_steps: int | None = flag(1000)
    train_batch_size: int = flag(1)
    shard: str | None = flag(None, "refused: processes draw differently many steps", refused=True)


class DrawnLatents(Reference):
    """Trains on x_t from the model as it is, drawn by DDIM from noise down to a random step."""

    per_prompt = 1  # images in a sample

    def prompts(self) -> list[str]:
        """What is drawn."""
        raise NotImplementedError

    def read(self) -> None:
        """There are no images."""

    def datasets(self) -> tuple[Captioned, None]:
        import torch

        from minisd.data.datasets import Prompts

        steps, total = self.options.ddim_steps, self.sd.schedule.num_train_timesteps
        require(steps <= total, f"--ddim_steps {steps}: the model has {total} timesteps")
        self.timetable = torch.tensor(self.times(), device=self.device)  # once: a copy of a list waits
        self.data = Prompts(self.prompts(), self.per_prompt)
        return self.data, None

    def latent_shape(self, batch: dict) -> tuple[int, ...]:
        side = self.options.resolution // self.sd.downscale
        return self.sd.channels, side, side

    def weights(self, timesteps: Tensor) -> float:
        return 1.0

    def inputs(self, batch: dict) -> dict:
        """x_t "noisy" (b, c, h, w), "timesteps" (b,) and "text" (b, s, d), on the device."""
        import torch

        o, shape = self.options, self.latent_shape(batch)
        streams = self.generators("timesteps", batch)
        stops = torch.stack([torch.randint(o.ddim_steps, (), generator=g) for g in streams])
        sent = self.send(batch | {"noise": self.draw("noise", batch, shape), "stops": stops})
        text = self.text(batch["prompt"])
        noisy, timesteps = self.draw_to(sent.pop("noise"), text, sent.pop("stops"), stops.max().item())
        return sent | {"noisy": noisy, "timesteps": timesteps, "text": text}

    @property
    def apart(self) -> int:
        """The number of timesteps that a step takes."""
        return self.sd.schedule.num_train_timesteps // self.options.ddim_steps

    def times(self) -> list[int]:
        """The timesteps before each step."""
        steps, final = self.options.ddim_steps, self.sd.schedule.num_train_timesteps - 1
        return [min(self.apart * i + 1, final) for i in reversed(range(steps))]

    def draw_to(self, x: Tensor, text: Tensor, stops: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """From noise x (b, c, h, w), x after stops[i] steps of sample i, of which `last` is the largest, and
        the timesteps there."""
        import torch

        times, noisy = self.timetable, x
        for step in range(last):
            t, after = (times[i].expand(len(x)) for i in (step, step + 1))
            with torch.no_grad():
                x = self.sd.schedule.ddim(self.guided(self.predict_drawing, x, t, text), x, t, after)
            noisy = torch.where((stops == step + 1).view(-1, 1, 1, 1), x, noisy)
        return noisy, times[stops]

    def guided(self, predict: Predict, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The prediction for x_t with guidance, by one of the `predict_` functions."""
        with_text, empty = predict(x, t, text, self.empty)
        return empty + self.options.start_guidance * (with_text - empty)

    def predict_drawing(self, x: Tensor, t: Tensor, *contexts: Tensor) -> tuple[Tensor, ...]:
        """The predictions that x_t is drawn by: those of the model as it is now."""
        return self.predict_with(self.sd.unet, x, t, *contexts)
