"""What the tests of the training methods share: data, short runs, and diffusers' side of a loss."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from minisd import cli, registry
from minisd.data.order import Stream, collate
from minisd.testing import assert_exactly_these_train, built, networks, new, options, train

# From here, too
__all__ = ["Stream", "assert_exactly_these_train", "built", "collate", "networks", "new", "options", "train"]

REWARD = str(registry.HERE / "tiny" / "redness.py")
registry.admit(REWARD)


def make_pairs(folder: Path, count: int = 4) -> Path:
    """`count` lines of {"source", "target", "prompt"}: an outline, and the filled shape."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        box, colour = (8 + i, 8, 40, 30 + 3 * i), (255, 60 * i, 90)
        for kind in ("source", "target"):
            image = Image.new("RGB", (48, 40), "black" if kind == "source" else (40 * i, 200, 128))
            fill = {"outline": "white"} if kind == "source" else {"fill": colour}
            ImageDraw.Draw(image).ellipse(box, **fill)
            image.save(folder / f"{kind}{i}.png")
        rows.append({"source": f"source{i}.png", "target": f"target{i}.png", "prompt": f"shape {i}"})
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


def outputs(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor that a run left, checkpoints included."""
    return {
        str(f.relative_to(folder)): {k: v.clone() for k, v in load_file(f).items()}
        for f in sorted(folder.rglob("*.safetensors"))
    }


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for file in a:
        assert a[file].keys() == b[file].keys()
        assert all(torch.equal(a[file][k], b[file][k]) for k in a[file]), file


def refuses(method: str, flag: str) -> bool:
    """Whether every use of the flag is an error."""
    return bool(cli.options_of(method).__dataclass_fields__[flag].metadata.get("refused"))


def learn(m, trained: dict, batch: dict, steps: int, lr: float) -> tuple[float, float]:
    """The loss of a batch before and after so many updates on it."""
    optimizer = torch.optim.AdamW(trained.values(), lr=lr)
    first = m.loss(batch).item()
    for _ in range(steps):
        loss = m.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, loss.item()


@dataclass
class Theirs:
    """By diffusers' models, of a method's own latents, noise and timesteps: what its network gets, and what
    it has to predict."""

    scheduler: object
    timesteps: torch.Tensor
    noisy: torch.Tensor
    target: torch.Tensor
    context: torch.Tensor

    def mse(self, pred: torch.Tensor, gamma: float | None = None) -> torch.Tensor:
        """The error of each sample, (b,), by min-SNR weights if `gamma` is given."""
        from diffusers.training_utils import compute_snr

        errors = F.mse_loss(pred, self.target, reduction="none").mean(dim=(1, 2, 3))
        if gamma is None:
            return errors
        snr = compute_snr(self.scheduler, self.timesteps)
        epsilon = self.scheduler.config.prediction_type == "epsilon"
        return errors * snr.clamp(max=gamma) / (snr if epsilon else snr + 1)


def encode(pipe, prompts: list[str]) -> torch.Tensor:
    """diffusers' context of prompts."""
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


def theirs_of(pipe, m, batch: dict, prompts: list[str] | None = None) -> Theirs:
    from diffusers import DDPMScheduler

    kind = m.sd.schedule.prediction_type
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    posterior = pipe.vae.encode(batch["pixels"]).latent_dist
    latents = posterior.mean + posterior.std * m.draw("posterior", batch, (4, 8, 8))
    latents = (latents * pipe.vae.config.scaling_factor).detach()
    noise, timesteps = m.draw("noise", batch, (4, 8, 8)), m.timesteps(batch)
    noise = noise + m.options.noise_offset * m.draw("offset", batch, (4, 1, 1))
    return Theirs(
        scheduler=scheduler,
        timesteps=timesteps,
        noisy=scheduler.add_noise(latents, noise, timesteps),
        target=noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps),
        context=encode(pipe, prompts or batch["prompt"]),
    )


def pipeline(model):
    """diffusers' pipeline of a folder, with DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shake(module: torch.nn.Module, size: float = 0.05) -> None:
    """Random values everywhere: no zero convolutions, no zero biases."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))


def assert_gradients(
    trained: dict, theirs: torch.nn.Module, prefix: str, rename=lambda name: name, within=1e-4
) -> None:
    """Each `within` so much of its own largest value, or of a ten-thousandth of the largest of all."""
    expected = {prefix + rename(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    floor = 1e-4 * max(g.abs().max() for g in expected.values())
    ours = {n: p.grad for n, p in trained.items() if n.startswith(prefix)}
    assert ours and ours.keys() == expected.keys()
    for name, gradient in ours.items():
        error = (gradient - expected[name]).abs().max() / max(expected[name].abs().max(), floor)
        assert error <= within, f"{name} is off by {error:.1e}"
