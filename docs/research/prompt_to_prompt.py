"""Edit an image by its prompt alone: prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626), word swap.

    python docs/research/prompt_to_prompt.py "3d emoji of a red apple" "3d emoji of a green apple"
    python docs/research/prompt_to_prompt.py "a cat on a chair" "a dog on a chair" --model v1-5.safetensors

Both images are drawn at once from the same noise, and for a share of the steps the second one attends as the
first one does: to the text (algorithm 1, equation 4) and, for fewer steps, to itself. So what the prompts
share stays where it is. Writes prompt_to_prompt.png: the source, the edit, and the second prompt by itself.
"""

import argparse

import torch

import minisd
from minisd.data.images import grid
from minisd.options import TINY


def inject(seen) -> torch.Tensor:
    """The output, of which the last row, the edit's, takes the probabilities of the row before it."""
    probabilities = seen.probabilities  # (rows, nh, n, m)
    values = seen.v[-1:].transpose(1, 2)  # (1, nh, m, hd)
    edited = (probabilities[-2:-1].to(values) @ values).transpose(1, 2)  # (1, n, nh, hd)
    return torch.cat([seen.output[:-1], edited])


def edit(sd, source: str, target: str, *, cross: float, own: float, steps: int, seed: int, **flags):
    """The source's image and the edited one."""
    scale = sd.default_size // sd.downscale
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, sd.channels, scale, scale, generator=generator).expand(2, -1, -1, -1)
    until = {"cross": cross * steps, "self": own * steps}

    def replace(seen):
        return inject(seen) if seen.step < until[seen.kind] else None

    with sd.watch("attn1|attn2", keep=None, replace=replace):
        return sd.generate([source, target], noise=noise, batch_size=2, steps=steps, seed=seed, **flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cross", type=float, default=0.8, help="share of the steps for cross-attention")
    parser.add_argument("--own", type=float, default=0.4, help="share of the steps for self-attention")
    o = parser.parse_args()
    sd, common = minisd.load(o.model), {"steps": o.steps, "seed": o.seed}
    source, edited = edit(sd, o.source, o.target, cross=o.cross, own=o.own, **common)
    _, alone = edit(sd, o.source, o.target, cross=0, own=0, **common)
    grid([source, edited, alone], columns=3).save("prompt_to_prompt.png")
    print("prompt_to_prompt.png: the source, the edit, the second prompt by itself")


if __name__ == "__main__":
    main()
