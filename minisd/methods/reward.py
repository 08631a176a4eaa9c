"""Train a model towards images that a function of yours rewards (DDPO, arXiv 2305.13301)."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from minisd import reading, registry
from minisd.methods._base import Tensor
from minisd.methods._policy import Decisions, Policy
from minisd.methods._reference import Tuned
from minisd.options import Count, Rate, Weight, flag, require


class Options(Tuned, Decisions):
    """Reward"""

    EXCLUDES = {"prompt": "prompt_file"}
    reward: str = flag(help="a Python file whose reward(images, prompts) gives each a number", code=True)
    prompt: list[str] = flag([], "what is drawn")
    prompt_file: Path | None = flag(None, "a text file with a prompt on each line")
    images_per_prompt: Count = flag(8, "images of a prompt that are drawn together and compared")
    clip_range: Rate = flag(1e-4, "how far from 1 the ratio of densities per latent still counts")
    kl_weight: Weight = flag(0.0, "weight of the divergence from the model before training")
    start_guidance: float = flag(5.0)
    plan: bool = flag(False, "refused: a reward needs images, and a plan has shapes alone", refused=True)
    train_batch_size: int = flag(1, "prompts in one forward pass on one device")
    learning_rate: float = flag(3e-4)
    output_dir: Path = flag(Path("rewarded-model"))

    def check(self):
        registry.find("rewards", self.reward)
        require(self.prompt or self.prompt_file, "give --prompt or --prompt_file")
        require(self.images_per_prompt > 1, "--images_per_prompt must be at least 2: rewards are compared")
        held = self.updates_per_round > 1 or not self.is_given("clip_range")
        require(held, "--clip_range has no effect with --updates_per_round 1: the ratio is 1")


class Reward(Policy):
    """Those decisions are made likelier that led to a reward above the mean of their prompt (DDPO with
    importance sampling, section 4.3).

    A sample is a prompt with all of its images. They have a mean and a deviation of their own, instead of the
    running ones of the prompt in the paper, which a run would have to remember.
    """

    def read(self) -> Callable:
        """There are no images, but a function."""
        return registry.load("rewards", self.options.reward).reward

    def prompts(self) -> list[str]:
        path = self.options.prompt_file
        return reading.lines(path, "prompt_file") if path else self.options.prompt

    @property
    def per_prompt(self) -> int:
        return self.options.images_per_prompt

    def inputs(self, batch: dict) -> dict:
        """What was `drawn`, with "reward" and "advantage" (b,), and "text" (b, s, d)."""
        (x, learned), text = self.drawn(batch), self.text(batch["prompt"])
        rewards = self.rewards(x, batch["prompt"])
        each = rewards.view(self.per_prompt, -1)  # image i of prompt j, (images, prompts)
        apart = (each - each.mean(dim=0)) / each.std(dim=0, correction=0).clamp(min=1e-6)
        found = self.send({"reward": rewards, "advantage": apart.flatten()})
        return {"number": batch["number"], "text": text} | learned | found

    def rewards(self, x: Tensor, prompts: list[str]) -> Tensor:
        """The rewards (b,) of latents, whose images the function gets prompt by prompt."""
        import torch

        from minisd.data.images import to_pil

        count, found = len(x) // self.per_prompt, torch.empty(len(x))
        for rows in (slice(j, None, count) for j in range(count)):
            images = [to_pil(pixels) for pixels in self.sd.decode(x[rows]).cpu()]
            try:
                numbers = map(float, self.read()(images, prompts[rows]))  # of which there may be no end
                values = torch.tensor([*islice(numbers, len(images) + 1)])
                require(len(values) == len(images), f"{len(values)} numbers for {len(images)} images")
                require(values.isfinite().all().item(), f"a number is not finite: {values.tolist()}")
            except (Exception, SystemExit) as e:  # of the user's
                raise ValueError(f"--reward {self.options.reward}: {type(e).__name__}: {e}") from e
            found[rows] = values
        return found

    def loss_of(self, batch: dict) -> Tensor:
        """Its gradient is that of the clipped surrogate, and of --kl_weight times the divergence of the steps
        (DPOK, arXiv 2305.16381); its value, for the log, is the mean reward with the sign changed."""
        import torch
        from torch.utils.checkpoint import checkpoint

        names, losses = ("x", "new", "timesteps", "before"), []
        for learned in zip(*(batch[name].unbind(1) for name in names), strict=True):
            middle = None
            if self.options.kl_weight:
                middle, _ = self.step(self.predict_before, learned[0], learned[2], batch["text"])
            # The activations of one step at a time are in memory.
            fixed = {"use_reentrant": False, "preserve_rng_state": False}
            losses.append(checkpoint(self.surrogate, batch, *learned, middle, **fixed))
        loss = torch.stack(losses).mean()
        return loss - loss.detach() - batch["reward"].mean()

    def surrogate(
        self, batch: dict, x: Tensor, new: Tensor, t: Tensor, before: Tensor, middle: Tensor | None
    ) -> Tensor:
        """The loss of one step of each image; `middle` is its mean by the model before training. As in the
        authors' code, densities and divergence are those per latent, a mean over the image's."""
        import torch

        from minisd.noise import log_density

        o, advantage = self.options, batch["advantage"]
        mean, sigma = self.step(self.predict_drawing, x, t, batch["text"])
        ratio = (log_density(new, mean, sigma) - before).exp()  # (b,)
        clipped = ratio.clamp(1 - o.clip_range, 1 + o.clip_range)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        return loss if middle is None else loss + o.kl_weight * ((mean - middle) / sigma).square().mean() / 2
