"""What the training methods share. By itself this class trains the UNet on captioned images.

A method overrides what differs:

load       the model that training starts from
build      what trains
read       what the data is
dataset    what a batch is
inputs     what the loss needs of a batch, as tensors on the device: all random draws and the text are in it
condition  what the UNet gets besides the noisy latents
losses     noisy_batch makes input and target, errors and weights turn the prediction into a number
save       the result

The loss is `loss_of(inputs(batch))`. In `loss_of` nothing comes from the CPU or goes to it: the program never
waits for the GPU, which can repeat all of it as a CUDA graph.
"""

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd import registry
from minisd.options import Captions, Diffusion, Training, Validation
from minisd.terminal import BRIEF

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator, Tensor
    from torch import device as Device
    from torch import dtype as Dtype
    from torch.nn import Module, Parameter

    from minisd.data.datasets import Captioned
    from minisd.data.source import Source
    from minisd.sampling.pixel_diffusion import PixelDiffusion
    from minisd.sampling.stable_diffusion import StableDiffusion

    Parameters = dict[str, Parameter]
    Prompts = list[tuple[str, Tensor | None]]  # each with its conditioning image (3, h, w) in [-1, 1]
else:  # this file and the methods import torch only inside functions: `--help` does not wait for it
    Captioned = Device = Dtype = Generator = Image = Module = Parameter = Parameters = Any
    PixelDiffusion = Prompts = Source = StableDiffusion = Tensor = Any


class Method:
    """One run: its options, its model, and one loss function for the loop."""

    preview_steps = 25  # of sampling, for the images that show what a run has learned

    def __init__(self, options: Training, device: Device):
        import torch

        from minisd.device import DTYPES, configure

        configure(options, search=not (isinstance(options, Captions) and options.bucket))
        self.options, self.device = options, device
        precision = options.mixed_precision
        if precision == "fp16" and device.type == "cpu":
            print("--mixed_precision fp16 needs a GPU: on this CPU the run is in fp32")
            precision = "no"
        self.dtype = DTYPES[precision]
        if options.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.kept: dict[str, Tensor] = {}  # what else a checkpoint has to hold, by names with a "|" in them
        self.lr_scale = 1.0  # a further factor of --scale_lr
        self.contexts: dict[str, Tensor] = {}  # of the latest prompts that a frozen text encoder has seen
        self.stored_contexts: Mapping[str, Tensor] = {}  # of those of the data: see training/latents.py
        self.read = functools.cache(self.read)
        self.share = lambda items, function: function(items)  # among processes: see Processes.share

    # What the training loop calls

    def read(self) -> Source:
        """The data that the flags name, read once and first: what is wrong with it is reported at once."""
        from minisd.data.source import from_options

        return from_options(self.options, self.options.cache_dir)

    def prepare(self) -> None:
        """Make what the data needs, in one process only, before the model is loaded."""

    def setup(self) -> Parameters:
        """Load the model, frozen. Returns what trains, by name, in fp32."""
        if isinstance(self.options, Validation):  # what is missing or does not run is reported first
            registry.load("schedulers", registry.find_scheduler(self.options.validation_scheduler)[0])
        self.validation_prompts = self.read_validation_prompts()
        self.sd = self.load()
        return self.build(self.sd)

    def datasets(self) -> tuple[Captioned, Captioned | None]:
        """The training set, and the held-out set if --validation_split is given: see data/datasets.py."""
        o, held_out, examples = self.options, None, self.read()
        if o.validation_split:
            examples, held_out = examples.split(o.validation_split, o.seed)
            held_out = self.dataset(held_out)
        self.data = self.dataset(examples)
        if "mask" in examples.columns and not getattr(o, "masked_loss", True):
            print("the data has masks, which do not count without --masked_loss")
        return self.data, held_out

    def before_update(self, step: int) -> None:
        """Called before each update; `step` are done."""

    def loss(self, batch: dict) -> Tensor:
        """The loss of a batch of the data."""
        return self.loss_of(self.inputs(batch))

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

    def load(self, dtype: Dtype | None = None, revision: str | None = None) -> StableDiffusion:
        """The model that the options name, frozen, with their noise schedule; in the run's precision unless
        `dtype` is given."""
        from minisd.sampling.stable_diffusion import StableDiffusion

        o, loading = self.options, self.options.loading()
        loading["revision"] = revision or o.revision
        sd = StableDiffusion.load(o.model, device=self.device, dtype=dtype or self.dtype, **loading)
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

    def dataset(
        self, source: Source, prompt: str | None = None, kind: type[Captioned] | None = None, **more
    ) -> Captioned:
        """The examples of a source: images, with captions if there are flags for these; `prompt` is that of
        images without a caption. `kind` is another class of the dataset, which takes `more`."""
        from minisd.data.datasets import Captioned

        o, captions = self.options, {"caption_column": None}
        if isinstance(o, Captions):
            halvings = len(self.sd.unet.config.block_out_channels) - 1
            step = self.sd.vae.config.downscale * 2**halvings
            captions = {
                "prompt": prompt, "caption_column": o.caption_column, "caption_dropout": o.caption_dropout,
                "shuffle_after": o.keep_tokens if o.shuffle_caption else None,
                "interpolation": o.image_interpolation_mode, "bucket": o.bucket, "step": step,
                "masked": o.masked_loss, "alpha": o.alpha_mask,
            }  # fmt: skip
        views = {"resolution": o.resolution, "center_crop": o.center_crop, "random_flip": o.random_flip}
        return (kind or Captioned)(source, image_column=o.image_column, **views, **captions, **more)

    def inputs(self, batch: dict) -> dict:
        """A batch of the data with its noise, timesteps and text, its tensors on the device."""
        shape = self.latent_shape(batch)
        drawn = self.noise(batch, shape) | {"posterior": self.draw("posterior", batch, shape)}
        return self.send(batch | drawn | {"text": self.text(batch["prompt"])})

    def loss_of(self, batch: dict) -> Tensor:
        """The mean over a batch of `inputs` of the weighted error of the prediction."""
        noisy, timesteps, target = self.noisy_batch(batch)
        pred = self.predict_noisy(noisy, timesteps, batch)
        weights = batch["weight"] * self.weights(timesteps)
        return (self.errors(pred, target, batch) * weights).mean()

    def condition(self, batch: dict) -> dict:
        """What the UNet gets besides the noisy latents and the timesteps."""
        text = batch["text"]
        return {"context": self.sd.encode_ids(text).to(self.dtype) if self.trains("text_encoder") else text}

    def latents(self, batch: dict) -> Tensor:
        """A sample from the posterior of the images' scaled latents (b, 4, h, w), in fp32."""
        cached = "mean" in batch
        mean, std = (batch["mean"], batch["std"]) if cached else self.sd.encode_images(batch["pixels"])
        return mean + std * batch["posterior"]

    def noisy_batch(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The forward process: the network's input (b, c, h, w) and the timesteps (b,) of a batch, and the
        target (b, c, h, w)."""
        schedule, latents, timesteps = self.sd.schedule, self.latents(batch), batch["timesteps"]
        noise = batch["noise"]
        noisy = schedule.add_noise(latents, batch.get("perturbed", noise), timesteps)
        return noisy, timesteps, schedule.target(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict) -> Tensor:
        """The prediction (b, c, h, w) for noisy latents; runs under autocast."""
        return self.sd.unet(noisy, timesteps, **self.condition(batch))

    def errors(self, pred: Tensor, target: Tensor, batch: dict) -> Tensor:
        """The mean squared error of each sample, in fp32: (b, c, h, w) -> (b,)."""
        return self.mean((pred.float() - target.float()).square(), batch)

    def mean(self, errors: Tensor, batch: dict) -> Tensor:
        """The mean of each sample's errors, (b, c, h, w) -> (b,). If it has a "mask" (b, 1, H, W) of greys in
        [0, 1], this, averaged over the area of each latent pixel, is their weight."""
        from torch.nn.functional import interpolate

        if "mask" not in batch:
            return errors.flatten(1).mean(dim=1)
        mask = interpolate(batch["mask"], errors.shape[2:], mode="area")  # (b, 1, h, w)
        counted = mask.flatten(1).mean(dim=1).clamp(min=1e-6)  # a crop may be black
        return (errors * mask).flatten(1).mean(dim=1) / counted

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """The weight of each sample's error, (b,), by --snr_gamma."""
        gamma = self.options.snr_gamma
        return 1.0 if gamma is None else self.sd.schedule.min_snr_weights(timesteps, gamma)

    def save(self, folder: Path) -> None:
        """Write the result: the whole model, trained parts in fp32 and the other parts as they were read."""
        self.sd.save(folder, {part for part in self.sd.parts if self.trains(part)})

    # What the methods use

    def unfreeze(self, name: str, module: Module) -> Parameters:
        """Train all of a module, in fp32 whatever precision the rest runs in."""
        module.float().requires_grad_(True)
        if self.options.gradient_checkpointing and hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
        return {f"{name}.{n}": p for n, p in module.named_parameters()}

    def add_token(self, sd: StableDiffusion, token: str, word: str, count: int, *, flag: str) -> Parameter:
        """Give the model a new token of `count` vectors, each initialized from that of `word`. Returns those
        of all new tokens (n, d). ValueError if the word is several tokens, or the token cannot be one."""
        from minisd.adapters import token_embedding

        start = sd.tokenizer.one(word)
        if start is None:
            problem = f"{word!r}, to start from, is {len(sd.tokenizer.encode(word))} tokens of this model"
            raise ValueError(f"--initializer_token: {problem}; give a word that is one token")
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
            return self.predict(noisy.to(self.dtype), timesteps, batch)

    def send(self, batch: dict) -> dict:
        """A batch with its tensors on the device."""
        import torch

        from minisd.device import send

        return {k: send(v, self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def autocast(self) -> AbstractContextManager:
        """The precision that the networks run in."""
        import torch

        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def generators(self, name: str, batch: dict) -> list[Generator]:
        """A generator for each sample, a function of the seed, `name` and the sample's number."""
        from minisd.noise import generator

        return [generator(self.options.seed, name, n) for n in batch["number"]]

    def draw(self, name: str, batch: dict, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (b, *shape) from `generators`, on the CPU."""
        from minisd.noise import randn

        return randn(shape, self.generators(name, batch))

    def noise(self, batch: dict, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The draws of the forward process, on the CPU: the timesteps (b,), the noise (b, *shape) with
        --noise_offset, and with --input_perturbation the noise of the input, "perturbed"."""
        o, noise = self.options, self.draw("noise", batch, shape)
        if o.noise_offset:
            noise = noise + o.noise_offset * self.draw("offset", batch, (shape[0], 1, 1))
        drawn = {"timesteps": self.timesteps(batch), "noise": noise}
        if o.input_perturbation:
            drawn["perturbed"] = noise + o.input_perturbation * self.draw("perturbation", batch, shape)
        return drawn

    def timesteps(self, batch: dict) -> Tensor:
        """(b,) uniform over the schedule, on the CPU."""
        import torch

        if "timestep" in batch:  # a held-out example has its own
            return torch.tensor(batch["timestep"])
        total, streams = self.sd.schedule.num_train_timesteps, self.generators("timesteps", batch)
        return torch.stack([torch.randint(total, (), generator=g) for g in streams])

    def latent_shape(self, batch: dict) -> tuple[int, ...]:
        """The shape (4, h, w) of the latents of each image."""
        if "mean" in batch:
            return batch["mean"].shape[1:]
        config = self.sd.vae.config
        return config.latent_channels, *(side // config.downscale for side in batch["pixels"].shape[2:])

    def trains(self, part: str) -> bool:
        """Whether anything in a part of the model trains."""
        return any(p.requires_grad for p in self.sd.parts[part].parameters())

    def text(self, prompts: list[str]) -> Tensor:
        """Prompts as token ids (b, s) if the text encoder trains, otherwise as its context (b, s, d)."""
        return self.sd.tokenizer(prompts) if self.trains("text_encoder") else self.frozen_context(prompts)

    @property
    def encodes_alone(self) -> bool:
        """Whether each prompt and image is encoded by itself, so that its bits do not depend on the others:
        on a CPU, and with --deterministic."""
        return self.device.type == "cpu" or self.options.deterministic

    def frozen_context(self, prompts: list[str]) -> Tensor:
        """Context (b, s, d) of a text encoder that does not train; that of a thousand prompts is kept. New
        prompts of a batch are encoded together, unless the method `encodes_alone`."""
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.contexts]
        self.contexts |= self.send({p: self.stored_contexts[p] for p in new if p in self.stored_contexts})
        new = [prompt for prompt in new if prompt not in self.contexts]
        for part in [[prompt] for prompt in new] if self.encodes_alone else [new] * bool(new):
            with torch.no_grad(), self.autocast():
                self.contexts |= zip(part, self.sd.encode_text(part).to(self.dtype), strict=True)
        context = torch.stack([self.contexts[prompt] for prompt in prompts])
        for prompt in list(self.contexts)[:-1000]:
            del self.contexts[prompt]
        return context

    # The images that show what a run has learned

    def preview(self, moment: str = "") -> Image | None:
        """The image to save during training, if a flag asks for one, or at a `moment`, "before" or "after": a
        row for each prompt, with its conditioning image first."""
        from minisd.data import images

        prompts = self.validation_prompts or (self.training_prompts() if moment else [])
        about, rows = f"{moment}: " if moment else "", []
        for prompt, image in prompts:
            conditioning = [] if image is None else [images.to_pil(image)]
            rows.append((about + prompt, conditioning + self.samples(prompt, image)))
        return images.labelled_rows(rows) if rows else None

    def trained_on(self) -> list[Image]:
        """Some of the images that are trained on; none if there are none."""
        parts = getattr(self.data, "parts", (self.data,))  # with prior preservation, the instances come first
        if not parts:
            return []
        source, column = parts[0].source, parts[0].image_column
        return [source.open(i, column) for i in range(min(8, len(source)))]

    def read_validation_prompts(self) -> Prompts:
        """The prompts to validate with, from the flags."""
        o = self.options
        return [(o.validation_prompt, None)] if isinstance(o, Validation) and o.validation_prompt else []

    def training_prompts(self) -> Prompts:
        """The prompts of the final preview if no flag gives any: one of the training set."""
        from minisd.noise import generator

        example = self.data.examples(0, generator(self.options.seed, "result"))[0]
        return [(example.prompt, self.conditioning_image(example.view))]

    def conditioning_image(self, view) -> Tensor | None:
        """The image (3, h, w) in [-1, 1] that conditions a view of the training set."""
        return None

    def sampling_kwargs(self, images: Tensor) -> dict:
        """The arguments of generate.pictures for conditioning images (b, 3, h, w) in [-1, 1]."""
        raise NotImplementedError

    def samples(self, prompt: str, image: Tensor | None = None) -> list[Image]:
        """--num_validation_images images for a prompt, from the same noise every time; `image` (3, h, w) in
        [-1, 1] conditions them."""
        from tqdm import tqdm

        from minisd.sampling.generate import Settings, pictures

        o, steps = self.options, self.preview_steps
        chosen = {"guidance_scale": o.validation_guidance_scale, "scheduler": o.validation_scheduler}
        settings = Settings(width=o.resolution, height=o.resolution, plain_prompt=True, steps=steps, **chosen)

        def draw(seeds: list[int]) -> list[Image]:
            drawing = {} if image is None else self.sampling_kwargs(image.expand(len(seeds), -1, -1, -1))
            with tqdm(total=len(seeds) * steps, desc="drawing", **BRIEF) as bar, self.autocast():
                drawing |= {"on_step": bar.update}
                return list(pictures(self.sd, [prompt] * len(seeds), seeds, settings, **drawing))

        return self.share([o.seed + i for i in range(o.num_validation_images)], draw)
