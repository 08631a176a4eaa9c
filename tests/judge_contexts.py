"""What a prompt can make the tiny model draw: a free context beside one that the text encoder could give.

    python tests/judge_contexts.py [CONCEPT ...] [--rates 0.15] [--seed 0]

Either the context (1, s, d) itself is trained on five poses of a thing on white, or the states before the
text encoder's last layer norm, through which all that tokens bring about has to pass. A row has the learning
rate (as a multiple of the root mean square of the start), how many of eight images show the thing, how alike
their shapes are, the loss on 40 fixed draws, and the median length of a position's state, which the norm
makes 1.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisd.data import images  # noqa: E402
from minisd.options import TINY  # noqa: E402
from minisd.sampling import prompt  # noqa: E402
from minisd.sampling.generate import Settings, pictures  # noqa: E402
from minisd.sampling.stable_diffusion import StableDiffusion  # noqa: E402
from minisd.tiny.concepts import UNSEEN, Concept  # noqa: E402
from minisd.tiny.pictures import SIDE  # noqa: E402
from minisd.tiny.trial import Trial, called, defaults  # noqa: E402
from minisd.tiny.unseen import on_white  # noqa: E402

FREE = ("the context", "before the norm")


def loss(sd: StableDiffusion, latents: Tensor, timesteps: Tensor, noise: Tensor, context: Tensor) -> Tensor:
    noisy = sd.schedule.add_noise(latents, noise, timesteps)
    return (sd.unet(noisy, timesteps, context.expand(len(latents), -1, -1)) - noise).square().mean()


def train(sd: StableDiffusion, concept: Concept, free: str, rate: float) -> tuple[Tensor, float]:
    """The context, and its loss on fixed draws."""
    shown = torch.stack([images.to_tensor(image) for image in on_white(concept)])
    with torch.no_grad():
        latents, _ = sd.encode_images(shown)
        model = sd.text_encoder.text_model
        states = model.embeddings(sd.tokenizer([called("3d", concept.start)]))
        for layer in model.encoder.layers:
            states = layer(states)
        start = model.final_layer_norm(states) if free == "the context" else states
    through = (lambda x: x) if free == "the context" else model.final_layer_norm
    trained, updates = start.clone().requires_grad_(True), 500
    optimizer = torch.optim.Adam([trained], lr=rate * start.square().mean().sqrt().item())
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / updates)) / 2)
    for _ in range(updates):
        batch = latents[torch.randint(len(latents), (8,))]
        timesteps, noise = torch.randint(1000, (8,)), torch.randn_like(batch)
        optimizer.zero_grad()
        loss(sd, batch, timesteps, noise, through(trained)).backward()
        optimizer.step()
        cosine.step()
    with torch.no_grad():
        batch = latents[torch.arange(40) % len(latents)]
        noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(99))
        context = through(trained)
        return context, loss(sd, batch, 25 * torch.arange(40), noise, context).item()


def measure(name: str, free: str, rate: float, seed: int, out: Path) -> str:
    concept = UNSEEN[name]
    t = Trial("textual_inversion", TINY, out, [], False)
    sd, tile = StableDiffusion.load(TINY, dtype=torch.float32), concept.tile()
    torch.manual_seed(seed)
    context, error = train(sd, concept, free, rate)
    norm, negative = sd.text_encoder.text_model.final_layer_norm, sd.encode_text([""])
    prompt.contexts = lambda sd, prompts, settings: (context.expand(len(prompts), -1, -1),
                                                     negative.expand(len(prompts), -1, -1))  # fmt: skip
    settings = Settings(width=SIDE, height=SIDE, **defaults()["sample"])
    drawn = list(pictures(sd, [""] * 8, range(8), settings, batch_size=8))
    lineup = t.lineup(tile, name)
    length = ((context - norm.bias) / norm.weight).square().mean(dim=2).sqrt().median()
    shown = f"{int(lineup.recognised(drawn).sum())} of 8 | {lineup.shape(drawn).mean():.2f}"
    return f"| {name} | {free} | {rate} | {shown} | {error:.3f} | {length:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("concepts", nargs="*", help=", ".join(UNSEEN))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.15])
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in o.concepts or UNSEEN:
            for free in FREE:
                for rate in o.rates:
                    print(measure(name, free, rate, o.seed, Path(folder) / "trial"), flush=True)


if __name__ == "__main__":
    main()
