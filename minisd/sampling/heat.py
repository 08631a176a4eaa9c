"""Where words of the prompt act on an image: heat maps of cross-attention (DAAM: Tang et al. 2022, arXiv
2210.04885)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.models.tokenizer import Tokenizer
from minisd.sampling.prompt import Prompt, tokenize
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.sampling.watch import watch

SIDE = 32  # of the maps


def places(tokenizer: Tokenizer, prompt: Prompt, word: str) -> list[int]:
    """Where the tokens of a word stand in a prompt's context, the first time. ValueError if they do not."""
    ids, inner = [i for chunk in tokenize(tokenizer, prompt) for i, _ in chunk], tokenizer.encode(word)
    for start in range(len(ids)):
        if inner and ids[start : start + len(inner)] == inner:
            return [*range(start, start + len(inner))]
    raise ValueError(f"--heatmap {word!r} is not in the prompt {prompt.text!r}")


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The image, dark where the map (h, w), from 0 to 1, is low."""
    mask = Image.fromarray((heat * 255).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: value // 5), mask)


@contextmanager
def mapped(
    sd: StableDiffusion, prompts: Sequence[Prompt], words: list[str]
) -> Iterator[Callable[[int, Image.Image], Image.Image]]:
    """Within it, images are drawn one at a time. What it yields makes, of the number and the image of the one
    that was just drawn, a row of the image and its map for each word: the mean over steps, layers and heads
    of how much a place attends to the word, scaled to its own maximum."""
    rows = [[places(sd.tokenizer, prompt, word) for word in words] for prompt in prompts]

    def row(number: int, image: Image.Image) -> Image.Image:
        mean = torch.stack([s.value for s in seen]).mean(dim=0).cpu()  # (s, h, w)
        seen.clear()
        maps = [mean[places].mean(dim=0) for places in rows[number]]
        shown = [overlay(image, heat / heat.max()) for heat in maps]
        return images.grid([image, *shown], columns=1 + len(shown))

    with watch(sd, "attn2", keep=lambda s: s.maps(SIDE)[0]) as seen:
        yield row
