"""Where each word of a prompt acts: heat maps of cross-attention (DAAM: Tang et al. 2022, arXiv 2210.04885).

    python docs/research/heat_maps.py "3d emoji of a red apple on a blue background" apple blue
    python docs/research/heat_maps.py "a cat on a chair" cat chair --model v1-5-pruned-emaonly.safetensors

Writes heat_maps.png: the image, and for each word the mean over steps, layers and heads of how much a place
attends to it, each map scaled to its own maximum. As `sample.py --heatmap` does.
"""

import argparse

import torch
from PIL import Image

import minisd
from minisd.data.images import grid
from minisd.options import TINY
from minisd.sampling.heat import overlay

SIDE = 32  # of the maps


def places(sd, prompt: str, word: str) -> list[int]:
    """Where the tokens of a word stand among those of the prompt."""
    ids = sd.tokenizer([prompt])[0].tolist()
    inner = [i for i in sd.tokenizer([word])[0].tolist() if i not in (ids[0], ids[-1])]
    for start in range(len(ids)):
        if inner and ids[start : start + len(inner)] == inner:
            return list(range(start, start + len(inner)))
    raise SystemExit(f"the prompt lacks {word!r}")


def heat_maps(sd, prompt: str, words: list[str], **flags) -> tuple[Image.Image, torch.Tensor]:
    """The image, and a map (words, h, w) from 0 to 1 for each word."""
    rows = [places(sd, prompt, word) for word in words]
    with sd.watch("attn2", keep=lambda seen: seen.maps(SIDE)[0]) as seen:
        (image,) = sd.generate(prompt, **flags)
    mean = torch.stack([s.value for s in seen]).mean(dim=0)  # (s, h, w)
    maps = torch.stack([mean[row].mean(dim=0) for row in rows])  # (words, h, w)
    return image, maps / maps.amax(dim=(1, 2), keepdim=True)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The command line of a file that draws one prompt and looks at words of it."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("words", nargs="+")
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    o = parser_of(__doc__).parse_args()
    image, maps = heat_maps(minisd.load(o.model), o.prompt, o.words, seed=o.seed, steps=30)
    shown = [image, *(overlay(image, heat) for heat in maps)]
    grid(shown, columns=len(shown)).save("heat_maps.png")
    print("heat_maps.png:", "the image,", ", ".join(o.words))


if __name__ == "__main__":
    main()
