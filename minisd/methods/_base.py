"""The seams of a training method. By itself this class trains the UNet on captioned images.

build      what trains
dataset    what a batch is
condition  what the UNet gets besides the noisy latents
loss       noisy_batch makes its input and target, errors and weights make a number of its prediction
save       what is left in the end

This file and the methods import torch only inside functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.options import Captions, Validation

if TYPE_CHECKING:
    import torch

    from minisd.methods._types import Image, Parameters, Prompts, Source, StableDiffusion, Tensor
    from minisd.options import Training


@dataclass(kw_only=True)
class NoisyBatch:
    """What the network sees of a batch, and what it has to predict."""

    latents: Tensor  # (b, c, h, w) without noise, scaled, in fp32 like all of these
    noise: Tensor  # (b, c, h, w)
    timesteps: Tensor  # (b,) on the CPU, where the schedule is
    noisy: Tensor  # (b, c, h, w) the network's input
    target: Tensor  # (b, c, h, w)


class Method:
    """One run: its options, its model, and one loss function for the loop."""

    def __init__(self, options: Training, device: torch.device):
        import torch

        from minisd import ops

        ops.choose(options.kernels)
        self.options, self.device = options, device
        precision = options.mixed_precision
        if precision == "fp16" and device.type == "cpu":
            print("--mixed_precision fp16 needs a GPU: on this CPU the run is in fp32")
            precision = "no"
        self.dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        if options.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.lr_scale = 1.0  # a further factor of --scale_lr
        self.unfrozen: set[str] = set()  # the parts of the model that train as a whole
        self.encode_prompt = functools.lru_cache(maxsize=1000)(self._encode_prompt)

    # What the training loop calls

    def prepare(self) -> None:
        """Make what the data needs, in one process only, before the model is loaded."""

    def setup(self) -> Parameters:
        """Load the model, frozen. Returns what trains, by name, in fp32."""
        self.validation_prompts = self.read_validation_prompts()  # first: a missing file is reported at once
        self.sd = self.load()
        return self.build(self.sd)

    def datasets(self) -> tuple:
        """The training set, and the held-out set if --validation_split asks for one: see data/datasets.py."""
        from minisd.data.source import from_options

        o, held_out = self.options, None
        examples = from_options(o, o.cache_dir)
        if o.validation_split:
            examples, held_out = examples.split(o.validation_split, o.seed)
            held_out = self.dataset(held_out)
        self.data = self.dataset(examples)
        return self.data, held_out

    def loss(self, batch: dict) -> Tensor:
        """The mean over the batch of the weighted error of the prediction."""
        noisy = self.noisy_batch(batch)
        pred = self.predict_noisy(noisy, batch)
        weights = batch["weight"] * self.weights(noisy.timesteps)
        return (self.errors(pred, noisy.target, batch) * weights.to(self.device)).mean()

    def preview(self, final: bool) -> Image | None:
        """The image to save during training, if a flag asks for one, or at the end of it (`final`)."""
        from minisd.methods import _preview

        prompts = self.validation_prompts or (self.training_prompts() if final else [])
        return _preview.sheet(self, prompts) if prompts else None

    def save_interval(self, updates_per_epoch: int) -> int:
        """Number of updates between two calls of `save_intermediate`; 0 for none."""
        return 0

    def save_intermediate(self, folder: Path, step: int) -> None:
        """Write the result as it is after update `step`."""
        self.save(folder)

    def describe(self) -> str:
        """What trains and on what, for people."""
        return self.data.summary()

    # The seams

    def load(self) -> StableDiffusion:
        """The model that the options name, frozen."""
        from minisd.methods import _model

        return _model.load(self.options, self.device, self.dtype)

    def build(self, sd: StableDiffusion) -> Parameters:
        """Insert into the model what trains, or unfreeze it. Returns that by name."""
        trained = self.unfreeze("unet", sd.unet)
        if isinstance(self.options, Captions) and self.options.train_text_encoder:
            trained |= self.unfreeze("text_encoder", sd.text_encoder)
        return trained

    def dataset(self, source: Source):
        """The examples of a source: captioned images."""
        from minisd.methods import _data

        return _data.captioned(source, self.options, self.sd)

    def condition(self, batch: dict) -> dict:
        """What the UNet gets besides the noisy latents and the timesteps."""
        if any(p.requires_grad for p in self.sd.text_encoder.parameters()):
            return {"context": self.sd.encode_text(batch["prompt"]).to(self.dtype)}
        return {"context": self.frozen_context(batch["prompt"])}

    def latents(self, batch: dict) -> Tensor:
        """A sample from the posterior of the images' scaled latents (b, 4, h, w), in fp32."""
        if "mean" in batch:
            mean, std = batch["mean"].to(self.device), batch["std"].to(self.device)
        else:
            mean, std = self.sd.encode_images(batch["pixels"])
        return mean + std * self.draw("posterior", batch, mean.shape[1:])

    def noisy_batch(self, batch: dict) -> NoisyBatch:
        """The forward process, with the flags' noise offset and input perturbation."""
        o, schedule, latents = self.options, self.sd.schedule, self.latents(batch)
        shape = latents.shape[1:]
        noise = self.draw("noise", batch, shape)
        if o.noise_offset:
            noise = noise + o.noise_offset * self.draw("offset", batch, (shape[0], 1, 1))
        perturbed = noise
        if o.input_perturbation:
            perturbed = noise + o.input_perturbation * self.draw("perturbation", batch, shape)
        timesteps = self.timesteps(batch)
        return NoisyBatch(
            latents=latents,
            noise=noise,
            timesteps=timesteps,
            noisy=schedule.add_noise(latents, perturbed, timesteps),
            target=schedule.target(latents, noise, timesteps),
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """The prediction (b, c, h, w) for noisy latents; runs under autocast."""
        return self.sd.unet(noisy, timesteps, **self.condition(batch))

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """The error of each sample's prediction, (b,)."""
        from minisd import losses

        return losses.mse(pred, target)

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """The weight of each sample's error, (b,): --snr_gamma's."""
        from minisd import losses

        gamma = self.options.snr_gamma
        return 1.0 if gamma is None else losses.min_snr_weights(self.sd.schedule, timesteps, gamma)

    def save(self, folder: Path) -> None:
        """Write the result: the whole model, trained parts in fp32 and the other parts as they were read."""
        self.sd.save(folder, self.unfrozen)

    def read_validation_prompts(self) -> Prompts:
        """What flags ask to generate during training."""
        o = self.options
        return [(o.validation_prompt, None)] if isinstance(o, Validation) and o.validation_prompt else []

    def training_prompts(self) -> Prompts:
        """What is generated at the end if no flag says what: a prompt of the training set."""
        from minisd.noise import generator

        example = self.data.examples(0, generator(self.options.seed, "result"))[0]
        return [(example.prompt, self.conditioning_image(example.view))]

    def conditioning_image(self, view) -> Tensor | None:
        """The image (3, h, w) in [-1, 1] that conditions a view of the training set."""
        return None

    def sampling_kwargs(self, images: Tensor) -> dict:
        """The arguments of generate.pictures for conditioning images (b, 3, h, w) in [-1, 1]."""
        raise NotImplementedError

    # What the seams use

    def unfreeze(self, name: str, module: torch.nn.Module) -> Parameters:
        """Train all of a module, in fp32 whatever precision the rest runs in."""
        module.float().requires_grad_(True)
        self.unfrozen.add(name)
        if self.options.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        return {f"{name}.{n}": p for n, p in module.named_parameters()}

    def predict_noisy(self, noisy: NoisyBatch, batch: dict) -> Tensor:
        """`predict` in the run's precision."""
        with self.autocast():
            return self.predict(noisy.noisy.to(self.dtype), noisy.timesteps.to(self.device), batch)

    def autocast(self) -> torch.autocast:
        """The precision that the networks run in."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def draw(self, name: str, batch: dict, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (b, *shape), a function of the seed, `name` and each sample's number."""
        from minisd.noise import generator, randn

        return randn(shape, [generator(self.options.seed, name, n) for n in batch["number"]]).to(self.device)

    def timesteps(self, batch: dict) -> Tensor:
        """(b,) uniform over the schedule; on the CPU, where the schedule is."""
        import torch

        from minisd.noise import generator

        if "timestep" in batch:  # a held-out example has its own
            return torch.tensor(batch["timestep"])
        total = self.sd.schedule.num_train_timesteps
        streams = [generator(self.options.seed, "timesteps", n) for n in batch["number"]]
        return torch.stack([torch.randint(total, (), generator=g) for g in streams])

    def frozen_context(self, prompts: list[str]) -> Tensor:
        """Context (b, s, d) of a text encoder that does not train. Each prompt is encoded by itself, so that
        it does not depend on the others in its batch, and only once."""
        import torch

        return torch.stack([self.encode_prompt(prompt) for prompt in prompts]).to(self.device)

    def _encode_prompt(self, prompt: str) -> Tensor:
        """Context (s, d) of a prompt, on the CPU."""
        import torch

        with torch.no_grad():
            return self.sd.encode_text([prompt])[0].to(self.dtype).cpu()
