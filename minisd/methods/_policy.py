"""What a policy gradient needs of drawing: every step's noise is a decision whose probability is known."""

from minisd.methods._base import Parameters, StableDiffusion, Tensor
from minisd.methods._drawn import Drawn, DrawnLatents, Predict
from minisd.options import Count, Positive, flag, require


class Decisions(Drawn):
    """Images that the model draws"""

    eta: Positive = flag(1.0, "how much noise a step of drawing adds, at most 1")
    ddim_steps: Count = flag(50, "steps of an image")
    learned_steps: Count = flag(10, "steps of each image, drawn at random, that are learned from")
    updates_per_round: Count = flag(2, "updates whose images the model draws as it is before the first")

    def check(self):
        require(self.eta <= 1, "--eta must be at most 1")


class Policy(DrawnLatents):
    """What is drawn is a function of the seed, the sample's number and the model as it was before the first
    update of a round. A checkpoint has that model's trained tensors, so neither a stop nor the number of
    processes changes anything."""

    def build(self, sd: StableDiffusion) -> Parameters:
        self.trained = super().build(sd)
        if self.options.updates_per_round > 1:
            self.kept = {f"drawing.{n}|": p.detach().clone() for n, p in self.trained.items()}
        return self.trained

    def before_update(self, step: int) -> None:
        import torch

        if self.kept and step % self.options.updates_per_round == 0:
            torch._foreach_copy_([*self.kept.values()], [p.detach() for p in self.trained.values()])

    def drawn(self, batch: dict) -> tuple[Tensor, dict]:
        """Latents of images (b, c, h, w), and of k of the steps to each: "x" and "new" (b, k, c, h, w), what
        it began and ended with, "timesteps" and the log density "before" (b, k)."""
        import torch

        from minisd.device import send, swapped
        from minisd.noise import log_density, randn, subset

        o, shape, steps = self.options, self.latent_shape(batch), []
        streams, choices = self.generators("drawing", batch), self.generators("steps", batch)
        chosen = torch.tensor([subset(o.ddim_steps, o.learned_steps, g) for g in choices])  # (b, k)
        x, text = send(self.draw("noise", batch, shape), self.device), self.text(batch["prompt"])
        swap = swapped(self.trained.values() if self.kept else (), self.kept.values())
        with torch.no_grad(), swap:
            for time in self.times():
                t = torch.full((len(x),), time, device=x.device)
                mean, sigma = self.step(self.predict_drawing, x, t, text)
                new = mean + sigma * send(randn(shape, streams), self.device)
                steps.append({"x": x, "new": new, "timesteps": t, "before": log_density(new, mean, sigma)})
                x = new
        rows, chosen = torch.arange(len(x), device=x.device)[:, None], send(chosen, self.device)
        return x, {name: torch.stack([s[name] for s in steps], dim=1)[rows, chosen] for name in steps[0]}

    def step(self, predict: Predict, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, c, h, w) and deviation (b, 1, 1, 1) of x after DDIM's step from timesteps t (b,)."""
        schedule, after = self.sd.schedule, (t - self.apart).clamp(min=0)
        sigma = self.options.eta * schedule.ddim_sigma(t, after, x)
        return schedule.ddim(self.guided(predict, x, t, text), x, t, after, sigma), sigma
