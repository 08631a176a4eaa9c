"""Make a word count: attend-and-excite (Chefer et al. 2023, arXiv 2301.13826).

    python docs/research/attend_and_excite.py "3d emoji of a cat on a blue background" cat blue
    python docs/research/attend_and_excite.py "a cat and a frog" cat frog --model sd-v1-5.safetensors

In the first half of the steps the latents move so that the least attended word is attended to more somewhere:
down the gradient of 1 - its largest attention (equations 1 and 2). Writes attend_and_excite.png: the image
without it and with it, and prints the least word's largest attention in both.
"""

import torch
import torch.nn.functional as F
from heat_maps import parser_of, places

import minisd
from minisd.data.images import grid


def attention(sd, latents: torch.Tensor, t: float, context: torch.Tensor, rows: list[list[int]], side: int):
    """The largest attention to each word, (words,), in smoothed maps without those of the first token."""
    with sd.watch("attn2", keep=lambda seen: seen.maps(side)[0]) as seen:
        sd.predict(latents, t, context)
    maps = torch.stack([s.value for s in seen]).mean(dim=0)[1:]  # (s - 1, h, w)
    maps = (100 * maps).softmax(dim=0)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=maps.device)
    kernel = (kernel[:, None] * kernel).expand(len(maps), 1, 3, 3)
    maps = F.conv2d(F.pad(maps[None], (1, 1, 1, 1), "reflect"), kernel, groups=len(maps))[0]
    return torch.stack([maps[[p - 1 for p in row]].amax() for row in rows])


def draw(sd, prompt: str, words: list[str], *, strength: float, steps: int, seed: int):
    """The image, and the least word's largest attention in the middle of the way."""
    rows, context = [places(sd, prompt, word) for word in words], sd.encode_text([prompt])
    times = sd.schedule.inference_timesteps(steps, "leading", 1).round().int().tolist()
    side = sd.default_size // sd.downscale // 2
    for step, x in enumerate(sd.steps(prompt, steps=steps, seed=seed, scheduler="ddim")):
        if step < steps // 2 and strength:
            latents = x.clone().requires_grad_()
            least = attention(sd, latents, times[step + 1], context, rows, side).min()
            (gradient,) = torch.autograd.grad(1 - least, latents)
            x -= strength * (1 - step / steps) * gradient  # the scheduler goes on from there
        if step == steps // 2:
            with torch.no_grad():
                reached = attention(sd, x, times[step + 1], context, rows, side).min().item()
    return sd.pictures(x)[0], reached


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--strength", type=float, default=20.0)
    o = parser.parse_args()
    sd, drawn = minisd.load(o.model, dtype=torch.float32), []
    for name, strength in (("without", 0.0), ("with", o.strength)):
        image, reached = draw(sd, o.prompt, o.words, strength=strength, steps=50, seed=o.seed)
        print(f"{name}: the least of {', '.join(o.words)} is attended to by {reached:.3f}")
        drawn.append(image)
    grid(drawn, columns=2).save("attend_and_excite.png")


if __name__ == "__main__":
    main()
