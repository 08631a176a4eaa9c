"""A LoRA whose scale turns a property up and down, from prompts alone (concept sliders, arXiv 2311.12092)."""

import functools
from pathlib import Path

from minisd.methods._base import Parameters, StableDiffusion, Tensor
from minisd.methods._drawn import Drawn, DrawnLatents
from minisd.methods._low_rank import Updates
from minisd.options import Positive, flag, require


class Options(Updates, Drawn):
    """Slider"""

    target_prompt: str = flag(help="what the property is of, such as 'a person'")
    positive_prompt: str = flag(help="the same with much of the property: 'an old person'")
    negative_prompt: str = flag(help="the same with little of it, or its contrary: 'a young person'")
    eta: Positive = flag(1.0, "strength of the property at scale 1")
    gradient_checkpointing: bool = flag(
        False, "refused: what is computed again in the backward would have another scale", refused=True
    )
    learning_rate: float = flag(2e-4)
    output_dir: Path = flag(Path("slider-lora"))

    def check(self):
        both = "--positive_prompt and --negative_prompt"
        require(
            self.positive_prompt != self.negative_prompt, f"{both} are the same, so there is no direction"
        )


class Sliders(DrawnLatents):
    """At scale 1 the model learns to predict what the one before training predicts, and a step in the
    direction from the negative to the positive prompt; at scale -1 a step back."""

    predict_drawing = DrawnLatents.predict_before  # by the model without the updates

    def build(self, sd: StableDiffusion) -> Parameters:
        return self.insert_updates(sd)

    @functools.cached_property
    def sides(self) -> list[Tensor]:
        """The contexts (1, s, d) of the positive and the negative prompt."""
        return [
            self.frozen_context([p]) for p in (self.options.positive_prompt, self.options.negative_prompt)
        ]

    def prompts(self) -> list[str]:
        return [self.options.target_prompt]

    def loss_of(self, batch: dict) -> Tensor:
        """The mean error in both directions (equation 8)."""
        noisy, timesteps, eta = batch["noisy"], batch["timesteps"], self.options.eta
        middle, positive, negative = self.predict_before(noisy, timesteps, batch["text"], *self.sides)
        errors = []
        for sign in (1.0, -1.0):
            with self.scaled(sign):
                pred = self.predict_noisy(noisy, timesteps, batch)
            errors.append(self.errors(pred, middle + sign * eta * (positive - negative), batch).mean())
        return sum(errors) / 2
