"""Scores by CLIP and DINO: transformers' own numbers, with models of random weights."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minisd import score
from minisd.data import images
from tests.conftest import TOKENIZER

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{flag: folder} of a CLIP and a ViT with random weights."""
    import transformers as t

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    text = SIZES | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = t.CLIPConfig(text_config=text, vision_config=SIZES | SEEN, projection_dim=8)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer = t.CLIPTokenizer.from_pretrained(str(TOKENIZER))
    t.CLIPModel(config).save_pretrained(folder / "clip")
    t.CLIPProcessor(t.CLIPImageProcessor(**sides), tokenizer).save_pretrained(folder / "clip")
    t.ViTModel(t.ViTConfig(**SIZES, **SEEN)).save_pretrained(folder / "dino")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    return {flag: folder / flag for flag in ("clip", "dino")}


@pytest.fixture
def pictures(tmp_path):
    """A folder of three images, one of four, and prompts for the first."""
    generator = torch.Generator().manual_seed(1)
    for name, count in (("drawn", 3), ("real", 4)):
        for i in range(count):
            pixels = (torch.rand(30 + i, 40, 3, generator=generator) * 255).byte().numpy()
            images.save_png(
                Image.fromarray(pixels),
                tmp_path / name / f"{i}.png",
                f"prompt {i}\nSteps: 1, Seed: 2, Size: 8x8",
            )
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn" / "00000-grid.png")
    (tmp_path / "prompts.txt").write_text("a cat\na much longer prompt about a dog\n\nred\n")
    return tmp_path


def run(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["score", *map(str, flags)])
    score.main()
    return capsys.readouterr().out


def opened(folder) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("?.png"))]


@torch.no_grad()
def test_the_scores_are_those_of_transformers(models, pictures, monkeypatch, capsys):
    import transformers as t

    flags = [
        "--like",
        pictures / "real",
        "--prompts",
        pictures / "prompts.txt",
        "--json",
        pictures / "s.json",
    ]
    named = [word for flag, path in models.items() for word in (f"--{flag}", path)]
    out = run(monkeypatch, capsys, pictures / "drawn", *flags, *named)
    found = json.loads((pictures / "s.json").read_text())
    assert found["images"] == ["0.png", "1.png", "2.png"]

    clip, processor = (
        t.CLIPModel.from_pretrained(models["clip"]),
        t.CLIPProcessor.from_pretrained(models["clip"]),
    )
    prompts = ["a cat", "a much longer prompt about a dog", "red"]
    inputs = processor(text=prompts, images=opened(pictures / "drawn"), return_tensors="pt", padding=True)
    logits = clip(**inputs).logits_per_image / clip.logit_scale.exp()  # cosines, by CLIP's own forward
    assert found["CLIP-T"]["values"] == pytest.approx(logits.diag().tolist(), abs=1e-6)

    vit, seen = (
        t.ViTModel.from_pretrained(models["dino"]),
        t.ViTImageProcessor.from_pretrained(models["dino"]),
    )
    for name, embed in {
        "CLIP-I": lambda p: clip(**processor(text="x", images=p, return_tensors="pt")).image_embeds,
        "DINO": lambda p: vit(**seen(images=p, return_tensors="pt")).last_hidden_state[:, 0],
    }.items():
        real = [embed([image]) for image in opened(pictures / "real")]
        expected = [
            sum(F.cosine_similarity(embed([image]), other).item() for other in real) / len(real)
            for image in opened(pictures / "drawn")
        ]
        assert found[name]["values"] == pytest.approx(expected, abs=1e-6), name
        assert found[name]["mean"] == pytest.approx(sum(expected) / 3) and f"{sum(expected) / 3:.4f}" in out
        low, high = found[name]["low"], found[name]["high"]
        assert min(expected) - 1e-6 <= low < high <= max(expected) + 1e-6


def test_prompts_are_those_of_the_files(models, pictures, monkeypatch, capsys):
    (pictures / "prompts.txt").write_text("prompt 0\nprompt 1\nprompt 2\n")
    common = [pictures / "drawn", "--clip", models["clip"]]
    recorded = run(monkeypatch, capsys, *common)
    assert (
        recorded == run(monkeypatch, capsys, *common, "--prompts", pictures / "prompts.txt")
        and "CLIP-T" in recorded
    )


def test_the_interval_is_that_of_the_mean():
    """Of many values it is the normal distribution's: 1.96 standard errors to both sides."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(2)) * 3 + 7
    error = values.std().item() / 4000**0.5
    low, high = score.interval(values)
    assert (values.mean().item() - low) / error == pytest.approx(1.96, abs=0.15)
    assert (high - values.mean().item()) / error == pytest.approx(1.96, abs=0.15)
    assert score.interval(values) == (low, high)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["drawn"], "give --clip, --dino or both"),
        (["drawn", "--dino", "dino"], "--dino needs --like"),
        (["drawn", "--like", "real", "--dino", "drawn"], "--dino drawn: "),
        (["none", "--clip", "clip"], "the folder none is no folder"),
        (["drawn", "--json", "prompts.txt"], "--json prompts.txt exists: --overwrite replaces it"),
        (["drawn", "--clip", "clip", "--prompts", "prompts.txt"], "has 2 lines: one for each of the 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(flags, message, pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    (pictures / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, capsys, *flags)
