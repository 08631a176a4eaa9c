"""What the training methods share. By itself this class trains the UNet on captioned images.

A method overrides what differs:

load       the model that training starts from
build      what trains
dataset    what a batch is
condition  what the UNet gets besides the noisy latents
loss       noisy_batch makes input and target, errors and weights turn the prediction into a number
save       the result

This file and the methods import torch only inside functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.methods._previews import Previews
from minisd.options import Captions, Diffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minisd.data.datasets import Captioned
    from minisd.data.source import Source
    from minisd.options import Training
    from minisd.sampling.stable_diffusion import StableDiffusion

    Parameters = dict[str, torch.nn.Parameter]


class Method(Previews):
    """One run: its options, its model, and one loss function for the loop."""

    def __init__(self, options: Training, device: torch.device):
        import torch

        from minisd import graph, ops

        ops.choose(options.kernels)
        graph.choose(options.graph)
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

    def datasets(self) -> tuple[Captioned, Captioned | None]:
        """The training set, and the held-out set if --validation_split is given: see data/datasets.py."""
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
        noisy, timesteps, target = self.noisy_batch(batch)
        pred = self.predict_noisy(noisy, timesteps, batch)
        weights = batch["weight"] * self.weights(timesteps)
        return (self.errors(pred, target, batch) * weights.to(self.device)).mean()

    def save_interval(self, updates_per_epoch: int) -> int:
        """Number of updates between two calls of `save_intermediate`; 0 for none."""
        return 0

    def save_intermediate(self, folder: Path, step: int) -> None:
        """Write the result as it is after update `step`."""
        self.save(folder)

    def describe(self) -> str:
        """A summary of what trains and on what data, for people."""
        return self.data.summary()

    # What a method overrides

    def load(self, dtype: torch.dtype | None = None, revision: str | None = None) -> StableDiffusion:
        """The model that the options name, frozen, with their noise schedule; in the run's precision unless
        `dtype` is given."""
        from minisd.sampling.stable_diffusion import StableDiffusion

        o = self.options
        sd = StableDiffusion.load(
            o.model,
            device=self.device,
            dtype=dtype or self.dtype,
            revision=revision or o.revision,
            variant=o.variant,
            ema=o.load_ema,
            tokenizer=o.tokenizer_name,
            cache_dir=o.cache_dir,
        )
        if isinstance(o, Diffusion) and o.prediction_type:
            sd.set_schedule(prediction_type=o.prediction_type)
        if isinstance(o, Diffusion) and o.rescale_betas_zero_snr:
            sd.set_schedule(rescale_betas_zero_snr=True)
        if o.gradient_checkpointing:
            sd.unet.enable_gradient_checkpointing()
        return sd

    def build(self, sd: StableDiffusion) -> Parameters:
        """Insert into the model what trains, or unfreeze it. Returns that by name."""
        trained = self.unfreeze("unet", sd.unet)
        if isinstance(self.options, Captions) and self.options.train_text_encoder:
            trained |= self.unfreeze("text_encoder", sd.text_encoder)
        return trained

    def dataset(self, source: Source, prompt: str | None = None) -> Captioned:
        """The examples of a source: images, with captions if there are flags for these; `prompt` is that of
        images without a caption."""
        from minisd.data.datasets import Captioned

        o, captions = self.options, {"caption_column": None}
        if isinstance(o, Captions):
            halvings = len(self.sd.unet.config.block_out_channels) - 1
            captions = {
                "prompt": prompt,
                "caption_column": o.caption_column,
                "caption_dropout": o.caption_dropout,
                "interpolation": o.image_interpolation_mode,
                "bucket": o.bucket,
                "step": self.sd.vae.config.downscale * 2**halvings,
            }
        return Captioned(
            source,
            image_column=o.image_column,
            resolution=o.resolution,
            center_crop=o.center_crop,
            random_flip=o.random_flip,
            **captions,
        )

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

    def noisy_batch(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The forward process, with the flags' noise offset and input perturbation: the network's input
        (b, c, h, w) and the timesteps (b,) of a batch, and the target (b, c, h, w)."""
        o, schedule, latents = self.options, self.sd.schedule, self.latents(batch)
        shape = latents.shape[1:]
        noise = self.draw("noise", batch, shape)
        if o.noise_offset:
            noise = noise + o.noise_offset * self.draw("offset", batch, (shape[0], 1, 1))
        perturbed = noise
        if o.input_perturbation:
            perturbed = noise + o.input_perturbation * self.draw("perturbation", batch, shape)
        timesteps = self.timesteps(batch)
        noisy = schedule.add_noise(latents, perturbed, timesteps)
        return noisy, timesteps, schedule.target(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """The prediction (b, c, h, w) for noisy latents; runs under autocast."""
        return self.sd.unet(noisy, timesteps, **self.condition(batch))

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """The error of each sample's prediction, (b,)."""
        from minisd import losses

        return losses.mse(pred, target)

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """The weight of each sample's error, (b,), by --snr_gamma."""
        from minisd import losses

        gamma = self.options.snr_gamma
        return 1.0 if gamma is None else losses.min_snr_weights(self.sd.schedule, timesteps, gamma)

    def save(self, folder: Path) -> None:
        """Write the result: the whole model, trained parts in fp32 and the other parts as they were read."""
        self.sd.save(folder, self.unfrozen)

    # What the methods use

    def unfreeze(self, name: str, module: torch.nn.Module) -> Parameters:
        """Train all of a module, in fp32 whatever precision the rest runs in."""
        module.float().requires_grad_(True)
        self.unfrozen.add(name)
        if self.options.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        return {f"{name}.{n}": p for n, p in module.named_parameters()}

    def add_token(
        self, sd: StableDiffusion, token: str, word: str, count: int, *, flag: str
    ) -> torch.nn.Parameter:
        """Give the model a new token of `count` vectors, each initialized from that of `word`. Returns those
        of all new tokens (n, d). ValueError if the word is several tokens, or the token cannot be one."""
        from minisd.adapters import token_embedding

        start = sd.tokenizer.one(word)
        if start is None:
            several = f"{len(sd.tokenizer.encode(word))} tokens of this model"
            raise ValueError(f"--initializer_token {word!r} is {several}; give a word that is one token")
        sd.text_encoder.float()  # the vectors' gradient passes through it, and it is a seventh of the UNet
        table = sd.text_encoder.text_model.embeddings.token_embedding.weight
        rows = table[start].repeat(count, 1)  # (n, d)
        try:
            return token_embedding.add_token(sd.tokenizer, sd.text_encoder, token, rows)
        except ValueError as e:
            raise ValueError(f"{flag}: {e}") from None

    def predict_noisy(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """`predict` in the run's precision."""
        with self.autocast():
            return self.predict(noisy.to(self.dtype), timesteps.to(self.device), batch)

    def autocast(self) -> torch.autocast:
        """The precision that the networks run in."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def generators(self, name: str, batch: dict) -> list[torch.Generator]:
        """A generator for each sample, a function of the seed, `name` and the sample's number."""
        from minisd.noise import generator

        return [generator(self.options.seed, name, n) for n in batch["number"]]

    def draw(self, name: str, batch: dict, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (b, *shape) from `generators`."""
        from minisd.noise import randn

        return randn(shape, self.generators(name, batch)).to(self.device)

    def timesteps(self, batch: dict) -> Tensor:
        """(b,) uniform over the schedule; on the CPU, where the schedule is."""
        import torch

        if "timestep" in batch:  # a held-out example has its own
            return torch.tensor(batch["timestep"])
        total = self.sd.schedule.num_train_timesteps
        streams = self.generators("timesteps", batch)
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
