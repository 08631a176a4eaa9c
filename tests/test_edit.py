"""Concepts erased in closed form: the least-squares solution, the files, and what is drawn."""

import pytest
import torch

from minisd.adapters import lora
from minisd.options import TINY
from minisd.sampling.edit import EDITED, edit
from minisd.sampling.stable_diffusion import StableDiffusion
from minisd.tiny import bank, measures
from minisd.tiny.metrics import draw
from minisd.tiny.trial import called
from tests.lora_helpers import randomised

ERASE, GUIDE, PRESERVE = ["a big cat", "a dog"], ["a small house", ""], ["a mug on a table", "a tree"]


def least_squares(sd, weight: torch.Tensor, lamb: float, clip_skip: int) -> torch.Tensor:
    """W that is the nearest to W c = W0 g, W p = W0 p and sqrt(lamb) W = sqrt(lamb) W0."""

    def rows(prompt: str) -> torch.Tensor:
        last = len(sd.tokenizer.encode(prompt))
        return sd.encode_ids(sd.tokenizer([prompt]), clip_skip)[0, last:].double()

    pairs = [*zip(ERASE, GUIDE, strict=True), *zip(PRESERVE, PRESERVE, strict=True)]
    inputs, outputs = [lamb**0.5 * torch.eye(weight.shape[1]).double()], [lamb**0.5 * weight.double().T]
    for old, new in pairs:
        c, g = rows(old), rows(new)
        count = min(len(c), len(g))
        inputs.append(c[:count]), outputs.append(g[:count] @ weight.double().T)
    return torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T


@pytest.mark.parametrize("lamb, clip_skip", [(0.5, 1), (20.0, 2)])
def test_it_is_the_least_squares_solution(sd, lamb, clip_skip):
    """With a LoRA attached, whose change is a part of the weights."""
    randomised(lora.insert(lora.networks(sd), ["attn2.to_k"], 2, 2.0))
    before = lora.merged(sd.unet)
    said = edit(sd, ERASE, GUIDE, PRESERVE, lamb=lamb, clip_skip=clip_skip)
    after = lora.merged(sd.unet)
    edited = {f"{name}.weight" for name in lora.layers(sd.unet) if name.endswith(EDITED)}
    assert said == f"2 erased, 2 preserved, by {len(edited)} layers of the UNet"
    for name, weight in before.items():
        expected = least_squares(sd, weight, lamb, clip_skip) if name in edited else weight
        error = (after[name] - expected).abs().max() / weight.abs().max()
        assert error <= (1e-6 if name in edited else 0), name
        assert name not in edited or (expected - weight).abs().max() > 0.01 * weight.abs().max()


def test_by_the_command(command, tmp_path):
    """The file draws as the model that was edited; a picture says how that was done."""
    flags = [
        "--erase_concepts",
        "3d emoji of a camel",
        "--preserve_concepts",
        "3d emoji of a dog",
        "--steps",
        2,
    ]
    drawn = ["--prompt", "3d emoji of a camel", "--seed", 3, "--output"]
    status, _, said = command("sample.py", *flags, *drawn, tmp_path / "a.png", "--export", tmp_path / "new")
    assert status == 0 and "concepts: 1 erased, 1 preserved" in said
    for more in (["--model", tmp_path / "new", "--guidance_scale", 3, "--steps", 2], ["--steps", 2]):
        assert command("sample.py", *more, *drawn, tmp_path / f"{len(more)}.png")[0] == 0
    assert command("sample.py", "--like", tmp_path / "a.png", "--output", tmp_path / "again.png")[0] == 0
    a, exported, plain, again = (images_of(tmp_path / f"{n}.png") for n in ("a", 6, 2, "again"))
    assert torch.equal(a, again) and (a - exported).abs().max() <= 8 < (a - plain).abs().max()


def images_of(path) -> torch.Tensor:
    from minisd.data import images

    return images.to_tensor(images.open_image(path)) * 127.5


def test_what_is_erased_goes_and_what_is_preserved_stays():
    sd, tiles = StableDiffusion.load(TINY), bank.read()

    def shown(name: str) -> bool:
        others = [tiles[n, "3d"] for n in bank.names() if n != name]
        lineup = measures.Lineup(tiles[name, "3d"], others)
        return lineup.recognised(draw(sd, [called("3d", name)], 0)).item()

    edit(
        sd, [called("3d", "camel")], preserve=[called("3d", name) for name in ("cat", "house", "dog", "fish")]
    )
    assert not shown("camel") and shown("cat")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--guide_concepts", "a dog"], "--guide_concepts needs --erase_concepts"),
        (["--lamb", "2"], "--lamb needs --erase_concepts"),
        (["--erase_concepts", "a cat", "--lamb", "0"], "--lamb must be positive"),
        (["--erase_concepts", "a cat", " "], "--erase_concepts: an empty prompt is no concept"),
        (["--erase_concepts", "x", "y", "z", "--guide_concepts", "a", "b"], "2 --guide_concepts: one for"),
        (["--erase_concepts", "x", "--guide_concepts", "x"], "--erase_concepts 'x' is its own"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(command, flags, message, tmp_path):
    status, _, said = command("sample.py", "--prompt", "a cat", "--output", tmp_path / "x.png", *flags)
    assert status == 2 and message in said and not (tmp_path / "x.png").exists()
