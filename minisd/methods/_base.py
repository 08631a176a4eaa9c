"""What the methods share: text-to-image training, in seams that a method overrides where it differs.

insert     what trains
examples   what an example is
condition  what the UNet gets besides the noisy latents
save       what is left in the end

This file and the methods import torch only when they are called, so that `--help` does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.options import Data, Latents, Model, Optimizer, Precision, Run, Validation

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


@dataclass(kw_only=True)
class Training(Data, Validation, Optimizer, Precision, Latents, Model, Run):
    """The flags of every method that starts from a Stable Diffusion model."""


class Method:
    """One run: its options, its model, and one loss function for the loop."""

    def __init__(self, options):
        import torch

        from minisd import ops
        from minisd.training.distributed import device

        ops.choose(options.kernels)
        self.options = options
        self.device = device()
        precision = options.mixed_precision
        if precision == "fp16" and self.device.type == "cpu":
            print("--mixed_precision fp16 needs a GPU: on this CPU the run is in fp32")
            precision = "no"
        self.dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        if options.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.thawed: set[str] = set()  # the parts of the model that train as a whole
        self.lr_scale = 1.0  # what --scale_lr multiplies by besides the pictures of an update
        self.held_out = None  # examples that are not trained on, if --validation_split asks for them
        self.updates_per_epoch = 0  # the loop says
        self.averaged = nullcontext  # inside, what trains has its average, if the loop keeps one
        self.contexts: dict[str, Tensor] = {}  # of prompts, where the text encoder is frozen

    def build(self) -> dict[str, torch.nn.Parameter]:
        """Load the model, frozen, and let some of it train: that, by name, in fp32."""
        self.asked = self.wanted()  # first: a picture that is not there is said before the model is read
        self.sd = self.load()
        return self.insert(self.sd)

    def dataset(self):
        """What is trained on: see minisd/data/datasets.py."""
        from minisd.data.source import from_options

        o = self.options
        source = from_options(o, cache_dir=o.cache_dir)
        if o.validation_split:
            source, held = source.split(o.validation_split, o.seed)
            self.held_out = self.examples(held)
        self.data = self.examples(source)
        return self.data

    # The seams

    def insert(self, sd) -> dict[str, torch.nn.Parameter]:
        """Put into the model what trains, or thaw it."""
        return self.thaw("unet", sd.unet)

    def examples(self, source):
        """The examples of a source: captioned pictures."""
        return self.captioned(source)

    def condition(self, batch: dict) -> dict:
        """What the UNet gets besides the noisy latents and the timesteps."""
        if any(p.requires_grad for p in self.sd.text_encoder.parameters()):
            return {"context": self.sd.encode_text(batch["prompt"]).to(self.dtype)}
        return {"context": self.frozen_context(batch["prompt"])}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """The prediction (b, c, h, w) for noisy latents; runs under autocast."""
        return self.sd.unet(noisy, timesteps, **self.condition(batch))

    def rectify(self, noisy: Tensor, target: Tensor, timesteps: Tensor, batch: dict):
        """The noisy latents and the target (b, c, h, w), before the prediction."""
        return noisy, target

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """How far off each sample's prediction is, (b,)."""
        from minisd import losses

        return losses.mse(pred, target)

    def save(self, folder: Path) -> None:
        """Write the result: the whole model, in fp32 what trained and as it was what did not."""
        self.sd.save(folder, self.thawed)

    def after_update(self, step: int) -> None:
        """Called after each optimizer update."""

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """All networks, those that are frozen too."""
        return self.sd.parts

    def describe(self) -> str:
        """What is about to be trained on."""
        held = f"\n  held out: {len(self.held_out)}" if self.held_out else ""
        return self.data.summary() + held

    # What the seams are called by

    def load(self, dtype: torch.dtype | None = None, revision: str | None = None):
        """The model that the options name, in `dtype`, or else in the precision of what is frozen."""
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
        changed = {
            "prediction_type": o.prediction_type,
            "rescale_betas_zero_snr": o.rescale_betas_zero_snr or None,
        }
        sd.set_schedule(**{k: v for k, v in changed.items() if v is not None})
        if o.gradient_checkpointing:
            sd.unet.enable_gradient_checkpointing()
        return sd

    def captioned(self, source, prompt: str | None = None):
        """The source's captioned pictures; `prompt` is that of pictures without a caption."""
        from minisd.data import datasets

        o = self.options
        return datasets.Captioned(
            source,
            image_column=o.image_column,
            caption_column=o.caption_column,
            caption_dropout=o.caption_dropout,
            prompt=prompt,
            bucket=o.bucket,
            step=self.sd.vae.config.downscale * 2 ** (len(self.sd.unet.config.block_out_channels) - 1),
            **self.shown(),
        )

    def uncaptioned(self, source):
        """The source's pictures alone."""
        from minisd.data import datasets

        o = self.options
        return datasets.Captioned(
            source,
            resolution=o.resolution,
            center_crop=o.center_crop,
            random_flip=o.random_flip,
            image_column=o.image_column,
            caption_column=None,
        )

    def shown(self) -> dict:
        """How the options want pictures to be cut."""
        o = self.options
        return {
            "resolution": o.resolution,
            "center_crop": o.center_crop,
            "random_flip": o.random_flip,
            "interpolation": o.image_interpolation_mode,
        }

    def teach(self, token: str, word: str, count: int = 1, *, flag: str) -> torch.nn.Parameter:
        """Give the model a new token of `count` vectors that start as the one of `word`. Returns those of all
        new tokens (n, d). ValueError if the word is several tokens, or the token cannot be one."""
        from minisd.adapters import token_embedding

        sd = self.sd
        start = sd.tokenizer.one(word)
        if start is None:
            several = f"{len(sd.tokenizer.encode(word))} tokens of this model"
            raise ValueError(f"--initializer_token {word!r} is {several}; give a word of one")
        sd.text_encoder.float()  # the vectors' gradient passes through it, and it is a seventh of the UNet
        table = sd.text_encoder.text_model.embeddings.token_embedding.weight
        rows = table[start].repeat(count, 1)  # (n, d)
        try:
            return token_embedding.add_token(sd.tokenizer, sd.text_encoder, token, rows)
        except ValueError as e:
            raise ValueError(f"{flag}: {e}") from None

    def frozen_context(self, prompts: list[str]) -> Tensor:
        """Context (b, s, d) of a text encoder that does not train: each of the last thousand prompts is
        encoded once. By itself, so that what it becomes does not depend on the others in its batch."""
        import torch

        for prompt in prompts:
            if prompt not in self.contexts:
                with torch.no_grad():
                    self.contexts[prompt] = self.sd.encode_text([prompt])[0].to(self.dtype).cpu()
        context = torch.stack([self.contexts[prompt] for prompt in prompts]).to(self.device)
        while len(self.contexts) > 1000:
            del self.contexts[next(iter(self.contexts))]
        return context

    def thaw(self, name: str, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """Let all of a module train, in fp32 whatever the rest runs in."""
        module.float().requires_grad_(True)
        self.thawed.add(name)
        if self.options.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        return {f"{name}.{n}": p for n, p in module.named_parameters()}

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

    def latents(self, batch: dict) -> Tensor:
        """A draw from the posterior of the pictures' scaled latents (b, 4, h, w), in fp32."""
        if "mean" in batch:
            mean, std = batch["mean"].to(self.device), batch["std"].to(self.device)
        else:
            mean, std = self.sd.encode_images(batch["pixels"])
        return mean + std * self.draw("posterior", batch, mean.shape[1:])

    def autocast(self):
        """What the networks run under."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss(self, batch: dict) -> Tensor:
        """The mean over the batch of the weighted squared error of the prediction."""
        from minisd import losses

        schedule = self.sd.schedule
        latents = self.latents(batch)
        noise = self.draw("noise", batch, latents.shape[1:])
        if self.options.noise_offset:
            offset = self.draw("offset", batch, (latents.shape[1], 1, 1))
            noise = noise + self.options.noise_offset * offset
        perturbed = noise
        if self.options.input_perturbation:
            perturbation = self.draw("perturbation", batch, latents.shape[1:])
            perturbed = noise + self.options.input_perturbation * perturbation
        timesteps = self.timesteps(batch)
        noisy = schedule.add_noise(latents, perturbed, timesteps)
        noisy, target = self.rectify(noisy, schedule.target(latents, noise, timesteps), timesteps, batch)
        with self.autocast():
            pred = self.predict(noisy.to(self.dtype), timesteps.to(self.device), batch)
        errors = self.errors(pred, target, batch)  # (b,)
        weights = batch["weight"]
        if self.options.snr_gamma is not None:
            weights = weights * losses.min_snr_weights(schedule, timesteps, self.options.snr_gamma)
        return (errors * weights.to(self.device)).mean()

    def held_out_loss(self) -> float:
        """The mean loss of the held-out examples. Number k of n is at the timestep (k + 1/2) / n of the
        schedule; its noise, crop and caption are those of its number."""
        import torch

        from minisd.data.order import Stream, collate

        stream, count, losses = Stream(self.held_out, self.options.seed), len(self.held_out), []
        total = self.sd.schedule.num_train_timesteps
        for k in range(count):  # one by one: they may be of different shapes
            own = {"number": f"held out {k}", "timestep": total * (2 * k + 1) // (2 * count)}
            with torch.no_grad():
                losses.append(self.loss(collate([[sample | own for sample in stream[k]]])))
        return torch.stack(losses).mean().item()

    # Pictures

    def wanted(self) -> list[tuple[str, Tensor | None]]:
        """The prompts that flags want drawn, each with the picture (3, h, w) in [-1, 1] that it goes with."""
        prompt = self.options.validation_prompt
        return [(prompt, None)] if prompt else []

    def example(self) -> list[tuple[str, Tensor | None]]:
        """What is drawn in the end if no flag says: a prompt of the training set, and its picture."""
        from minisd.noise import generator

        example = self.data.examples(0, generator(self.options.seed, "result"))[0]
        return [(example.prompt, self.beside(example.view))]

    def beside(self, view) -> Tensor | None:
        """The picture (3, h, w) in [-1, 1] that the prompt of a view goes with."""
        return None

    def steer(self, pictures: Tensor) -> dict:
        """How generate.pictures is told to draw by these, (b, 3, h, w)."""
        raise NotImplementedError

    @property
    def validates(self) -> bool:
        """Whether a flag asks for pictures while training."""
        return bool(self.asked)

    def validation(self) -> Image.Image:
        """What is drawn while training."""
        return self.sheet(self.asked)

    def result(self) -> Image.Image:
        """What is drawn in the end."""
        return self.sheet(self.asked or self.example())

    def sheet(self, wanted: list[tuple[str, Tensor | None]]) -> Image.Image:
        """A row for each prompt: the picture that it goes with, then what is drawn."""
        from minisd.data import images

        rows = []
        for prompt, picture in wanted:
            shown = [] if picture is None else [images.to_pil(picture)]
            rows.append((prompt, shown + self.samples(prompt, picture)))
        return images.labelled_rows(rows)

    def samples(self, prompt: str, picture: Tensor | None = None) -> list[Image.Image]:
        """The pictures of a prompt, drawn with the live modules. The same noise every time."""
        from minisd.sampling.generate import Settings, pictures

        o, count = self.options, self.options.num_validation_images
        about = {"guidance_scale": o.validation_guidance_scale, "scheduler": o.validation_scheduler}
        size = {"width": o.resolution, "height": o.resolution}
        settings = Settings(**size, steps=25, plain_prompt=True, **about)
        further = {} if picture is None else self.steer(picture.expand(count, -1, -1, -1))
        seeds = [o.seed + i for i in range(count)]
        with self.drawing(count * settings.steps) as on_step:
            return list(pictures(self.sd, [prompt] * count, seeds, settings, on_step=on_step, **further))

    @contextmanager
    def drawing(self, steps: int) -> Iterator[Callable[[int], None]]:
        """A bar of so many steps, in the precision of the run; gives what moves it."""
        from tqdm import tqdm

        with tqdm(total=steps, desc="drawing", leave=False) as bar, self.autocast():
            yield bar.update
