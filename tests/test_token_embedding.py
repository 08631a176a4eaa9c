"""Embeddings of new tokens: read and written as diffusers does."""

import pytest
import torch
from safetensors.torch import save_file

from minisd.adapters import token_embedding
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.picture_helpers import draw_theirs, psnr

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("vectors", [1, 3])
def test_our_embeddings_load_in_diffusers(model, pipe, tmp_path, vectors):
    rows = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(1))
    token_embedding.save(tmp_path / "learned_embeds.safetensors", "<cat-toy>", rows, {"format": "pt"})
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    sd = StableDiffusion.load(model)
    assert sd.attach(tmp_path) == [f"<cat-toy> ({vectors} vector{'s' if vectors > 1 else ''})"]
    prompt = "a photo of <cat-toy> on a table"
    drawn = list(pictures(sd, [prompt], [0], Settings(width=32, height=32, steps=10)))
    expected = draw_theirs(pipe, [prompt], [0], 32, 32, num_inference_steps=10, guidance_scale=7.5)
    assert psnr(drawn[0], expected[0]) >= 50
    plain = StableDiffusion.load(model)
    assert psnr(drawn[0], next(pictures(plain, [prompt], [0], Settings(width=32, height=32, steps=10)))) < 45


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 32)], ids=str)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_embeddings_of_diffusers_load_here(model, tmp_path, shape, suffix):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    file = tmp_path / f"learned_embeds{suffix}"
    save_file({"<toy>": rows}, file) if suffix == ".safetensors" else torch.save({"<toy>": rows}, file)
    sd = StableDiffusion.load(model)
    sd.attach(file)
    ids = sd.tokenizer.encode("a <toy>, a <TOY>")
    count = rows.numel() // 32
    assert ids == [320, *range(49408, 49408 + count), 267, 320, *range(49408, 49408 + count)]
    table = sd.text_encoder.text_model.embeddings.token_embedding
    assert torch.equal(table(torch.tensor(ids[1 : 1 + count])), rows.view(-1, 32))


def test_embedding_of_another_width_is_refused(model, tmp_path):
    token_embedding.save(tmp_path / "sd2.safetensors", "<toy>", torch.zeros(1, 1024), {})
    with pytest.raises(ValueError, match="sd2.safetensors.*1024"):
        StableDiffusion.load(model).attach(tmp_path / "sd2.safetensors")


def test_two_embeddings_at_once(model, tmp_path):
    sd = StableDiffusion.load(model)
    for token, value in (("<a>", 1.0), ("<a-b>", 2.0)):
        token_embedding.save(tmp_path / f"{token}.safetensors", token, torch.full((1, 32), value), {})
        sd.attach(tmp_path / f"{token}.safetensors")
    assert sd.tokenizer.encode("<a-b><a>") == [49409, 49408]
    table = sd.text_encoder.text_model.embeddings.token_embedding
    assert table(torch.tensor([49408, 49409])).mean(dim=1).tolist() == [1.0, 2.0]
    token_embedding.save(tmp_path / "other.safetensors", "<A>", torch.zeros(1, 32), {})
    with pytest.raises(ValueError, match="other.safetensors: placeholder '<a>' is a token already"):
        sd.attach(tmp_path / "other.safetensors")
