"""The assembled model: networks, tokenizer and noise schedule, loaded from a file of any format."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from minisd import files, reading, registry
from minisd.adapters import _adapter, controlnet, lora, t2i_adapter, token_embedding
from minisd.adapters._adapter import Attached
from minisd.device import send
from minisd.formats import diffusers, hub, single_file
from minisd.formats.parts import PARTS, PIPELINES, PipelineParts, build, fill
from minisd.models.controlnet import ControlNet
from minisd.models.layers import move
from minisd.models.t2i_adapter import T2IAdapter
from minisd.models.text import TextEncoder
from minisd.models.tokenizer import Tokenizer
from minisd.models.unet import UNet
from minisd.models.vae import AutoencoderKL
from minisd.noise import NoiseSchedule
from minisd.options import require


class StableDiffusion:
    """unet, vae and text_encoder on one device, with tokenizer and noise schedule."""

    is_pixels = False

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        scheduler: dict,
        name: str,
    ):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler  # the content of scheduler_config.json
        self.set_schedule()
        self.name = name  # of the folder or file, without its suffix
        self.original: dict[str, dict[str, Tensor]] = {}  # the files' tensors by part, memory-mapped
        self.source: Path | None = None  # the folder or file that it was loaded from
        self.cache_dir: str | None = None  # for files from the hub
        self.attached: dict[Path, Attached] = {}
        self.controlnets: dict[str, ControlNet | T2IAdapter] = {}  # loaded so far, by path or hub id
        self.image_encoders: dict[str, torch.nn.Module] = {}  # of transformers, loaded so far
        self.downscale = vae.config.downscale  # pixels per latent along a side
        self.channels = vae.config.latent_channels
        self.default_size = unet.config.sample_size * self.downscale  # side of the training images, in pixels

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        ema: bool = False,
        tokenizer: str | None = None,
        cache_dir: str | None = None,
    ) -> "StableDiffusion":
        """Load a folder in the diffusers layout, a single file with CompVis names, or a hub id, frozen.
        ValueError, naming the file, if it is none of these or not a Stable Diffusion v1.x."""
        path = hub.resolve(str(model), revision=revision, variant=variant, cache_dir=cache_dir)
        try:
            pipeline: PipelineParts = registry.match("formats", path).load(path, variant=variant, ema=ema)
        except ValueError:
            refuse_adapter(path)
            raise
        original = {part: network.state_dict() for part, network in pipeline.networks.items()}
        networks = {
            part: move(network, device, dtype).eval().requires_grad_(False)
            for part, network in pipeline.networks.items()
        }
        folder = Path(tokenizer) if tokenizer else pipeline.tokenizer
        config = pipeline.text_encoder.config
        words = Tokenizer(folder, config.max_positions)
        sizes = f"{words.vocab_size} tokens, but the text encoder of {path} has {config.vocab_size}"
        require(words.vocab_size == config.vocab_size, f"{folder} has {sizes}")
        sd = cls(**networks, tokenizer=words, scheduler=pipeline.scheduler, name=path.stem)
        sd.original, sd.source, sd.cache_dir = original, path, cache_dir
        return sd

    def set_schedule(self, **changes) -> None:
        """Change entries of scheduler_config.json; they are saved with the model."""
        self.scheduler = self.scheduler | changes
        self.schedule = NoiseSchedule.from_config(self.scheduler)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        return {part: getattr(self, part) for part in PARTS}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def is_pix2pix(self) -> bool:
        """Whether the UNet takes the latents of an image to edit (instruct-pix2pix)."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask, and the latents of what is outside it."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels + 1

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Context (b, s, d) of prompts as plain text, truncated to the encoder's length."""
        return self.encode_ids(self.tokenizer(prompts))

    def encode_ids(self, ids: Tensor, clip_skip: int = 1, flag: str = "clip_skip") -> Tensor:
        """Context (b, s, d) of token ids (b, s); `clip_skip` counts layers from the end, 1 is the last.
        ValueError, naming the flag, if there are not so many."""
        layers = self.text_encoder.config.num_layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"--{flag} {clip_skip}: this text encoder has {layers} layers, 1 is the last")
        return self.text_encoder(send(ids, self.device), clip_skip - 1)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents (b, 4, h, w), in fp32, of pixels (b, 3, 8h, 8w)."""
        with torch.no_grad():
            pixels = pixels.to(self.device, self.vae.quant_conv.weight.dtype)
            mean, std = self.vae.encode(pixels)
        return mean.float(), std.float()

    def encode_original(self, pixels: Tensor) -> Tensor:
        """The input (b, 4, h, w) of an instruct-pix2pix UNet for pixels (b, 3, 8h, 8w): the mean of the
        latents, not scaled, in fp32."""
        return self.encode_images(pixels)[0] / self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (b, 4, h, w) to pixels (b, 3, 8h, 8w), about [-1, 1]."""
        with torch.no_grad():
            pixels = self.vae.decode(latents.to(self.vae.post_quant_conv.weight.dtype))
            if not pixels.isfinite().all() and self.vae.post_quant_conv.weight.dtype == torch.float16:
                self.vae.float()  # some VAEs overflow in fp16; from here on this one decodes in fp32
                pixels = self.vae.decode(latents.float())
        return pixels.float()

    def attach(self, path: str | Path, scale: float = 1.0, text_scale: float | None = None) -> list[str]:
        """Attach the adapter in a file, or those in a folder, and return their descriptions. At `scale` 0 the
        model is unchanged, to the bit. `text_scale` is the text encoder's scale, by default the same.

        ValueError, naming the file and changing nothing, if it does not fit, or is attached already.
        """
        path = Path(path)
        paths = adapter_files(path)
        taken = {file for attached in self.attached.values() for file in attached.files}
        adapters = [_adapter.read(self, file) for file in paths]
        for file in paths:
            require(
                reading.real(file) not in taken, f"{file} is attached already (`rescale` changes its scale)"
            )
        attached = Attached(files=[reading.real(file) for file in paths], adapters=adapters)
        attached.rescale(scale, text_scale, str(path))
        tokens = [token.lower() for adapter in adapters for token in adapter.tokens]
        require(len({*tokens}) == len(tokens), f"{path} has the same token in several files")
        for adapter in adapters:
            for token, rows in adapter.tokens.items():
                extra = token_embedding.add_token(self.tokenizer, self.text_encoder, token, rows)
                extra.requires_grad_(False)
            lora.put(lora.networks(self), adapter.updates)
        self.attached[reading.real(path)] = attached
        return [adapter.description for adapter in adapters]

    def rescale(self, name: str | Path, scale: float, text_scale: float | None = None) -> None:
        """Set the scale of an attached adapter. `name` is its path, or the path's last part, with or without
        the suffix. ValueError if there is no such adapter, or if it has no scale."""
        matches = [path for path in self.attached if path == reading.real(name)]
        matches = matches or [path for path in self.attached if str(name) in (path.name, path.stem)]
        if len(matches) != 1:
            known = ", ".join(map(str, matches or self.attached)) or "nothing"
            is_what = "the name of several adapters" if matches else "no adapter that is attached"
            raise ValueError(f"{name} is {is_what}: {known}")
        self.attached[matches[0]].rescale(scale, text_scale, str(name))

    def controlnet(self, source: str) -> ControlNet | T2IAdapter:
        """The ControlNet or T2I-Adapter in a folder, a single file or a hub id, loaded once. ValueError,
        naming the source, if there is none, or if it does not fit this UNet."""
        if source not in self.controlnets:
            dtype, path = self.unet.conv_in.weight.dtype, hub.resolve(source, cache_dir=self.cache_dir)
            if t2i_adapter.matches(tensors := t2i_adapter.tensors_in(path)):
                network = t2i_adapter.load(tensors, self.unet.config, self.downscale, source)
                network = move(network, self.device, dtype).eval().requires_grad_(False)
            else:
                network = controlnet.load(path, device=self.device, dtype=dtype)
                controlnet.check(network, self.unet.config, source)
            self.controlnets[source] = network
        return self.controlnets[source]

    def exact(self, part: str, name: str, tensor: Tensor) -> Tensor:
        """The tensor of the model's file if a network's tensor is a rounded copy of it, else the latter."""
        original = self.original.get(part, {}).get(name)
        if original is None or original.shape != tensor.shape or not torch.equal(original.to(tensor), tensor):
            return tensor
        return original

    def save(self, folder: Path, changed: Collection[str] = PARTS) -> None:
        """Write the whole model in the diffusers layout, with its added tokens and LoRAs. Parts that are not
        `changed` are written as they were loaded, whatever precision they run in."""
        tensors = {part: lora.merged(module) for part, module in self.parts.items()}
        for part, original in self.original.items():
            tensors[part] |= original if part not in changed else {}
        with self._pipeline(tensors, folder) as pipeline:
            diffusers.save(folder, pipeline)

    def export(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model with all adapters merged in at their scales: a single file with CompVis names if
        `path` ends in .safetensors, else a folder in the diffusers layout. Each tensor is rounded once, to
        `dtype` or to its precision in the model's file.

        ValueError, naming `path`, if it is the model itself or a folder of other files, or if it is a file
        and there are added tokens, which only a folder can hold.
        """
        path = Path(path)
        single = path.suffix.lower() == files.SAFETENSORS
        tokens = ", ".join(self.tokenizer.placeholders)
        adapters = [file for attached in self.attached.values() for file in attached.files]
        foreign = path.is_dir() and any(path.iterdir()) and not (path / diffusers.INDEX).is_file()
        for reason, holds in {
            f"a model is a {files.SAFETENSORS} file, or a folder": path.suffix in files.PICKLES,
            "it is the model itself": self.source and reading.real(path) == reading.real(self.source),
            "it is one of the adapters": reading.real(path) in adapters,
            "an IP-Adapter stays a file of its own, beside the model": any(
                adapter.image_prompt for attached in self.attached.values() for adapter in attached.adapters
            ),
            f"a single file has no place for {tokens}; a folder has": single and tokens,
            "it holds other things than a model": foreign,
        }.items():
            require(not holds, f"cannot write {path}: {reason}")
        tensors = {}
        for part, module in self.parts.items():
            own = {n: self.exact(part, n, t) for n, t in lora.own_state(module).items()}
            original = self.original.get(part, {})
            merged = lora.merged(module, own, dtype)
            tensors[part] = {n: t.to(dtype or original.get(n, t).dtype) for n, t in merged.items()}
        with self._pipeline(tensors, path) as pipeline:
            (single_file if single else diffusers).save(path, pipeline)

    @contextmanager
    def _pipeline(self, tensors: dict[str, dict[str, Tensor]], path: Path) -> Iterator[PipelineParts]:
        """Yield networks with these tensors, to be written to `path`; added tokens are in the vocabulary."""
        configs = {part: network.config for part, network in self.parts.items()}
        configs["text_encoder"], words = token_embedding.merged(self.text_encoder, tensors["text_encoder"])
        tensors = tensors | {"text_encoder": words}
        networks = {part: fill(build(part, configs[part], path), tensors[part], path) for part in PARTS}
        networks["vae"].new_attention = getattr(self.vae, "new_attention", False)
        with tempfile.TemporaryDirectory() as tokenizer:
            folder, kind = self.tokenizer.save(Path(tokenizer)), PIPELINES[self.unet.config.in_channels]
            yield PipelineParts(**networks, scheduler=self.scheduler, tokenizer=folder, pipeline_class=kind)


def refuse_adapter(path: Path) -> None:
    """ValueError if a file, or one in a folder, is an adapter or a ControlNet, and no model."""
    for file in [path] if path.is_file() else [*path.glob(f"*{files.SAFETENSORS}"), *path.glob("*.bin")]:
        with suppress(ValueError):
            kind = registry.match("adapters", files.read(file))
            break
    else:
        return
    flag = "--controlnet" if hasattr(kind, "CONTROL") else "--adapter"
    raise ValueError(f"{path} is no model: sample.py takes it by {flag}, beside the --model")


def adapter_files(path: Path) -> list[Path]:
    """The file, or the results of a training run in a folder, without those of intermediate steps."""
    if not path.is_dir():
        return [path]
    results = sorted(p for p in path.iterdir() if "-steps-" not in p.name)
    tensors = [p for p in results if p.suffix == files.SAFETENSORS]
    # A pickle is read only if there is no safetensors file of the same name.
    pickles = [p for p in results if p.suffix == ".bin" and p.with_suffix(files.SAFETENSORS) not in tensors]
    require(tensors or pickles, f"{path} holds no adapter: no .safetensors or .bin file")
    return sorted(tensors + pickles)
