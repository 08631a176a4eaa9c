"""LoRA's layers and updates: what they compute, at which scales, and under which names they are attached."""

import math

import pytest
import torch

from minisd.adapters import lora, token_embedding
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.lora_helpers import (
    ALL,
    close,
    fresh,
    new,
    outputs,
    randomised,
    same_weights,
    weights,
    with_weights,
)


@pytest.mark.parametrize("target", [*ALL, "conv_in", "time_embedding.linear_1"])
def test_a_new_update_changes_nothing(sd, target):
    before, names = outputs(sd), set(lora.networks(sd).state_dict())
    updates = lora.insert(lora.networks(sd), [target], 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(outputs(sd), before, strict=True))
    assert names < set(lora.networks(sd).state_dict())  # base names stay
    assert all(p.dtype == torch.float32 for u in updates.values() for p in u.parameters())
    randomised(updates)
    assert not close(outputs(sd), before, 1e-3)


def test_how_it_begins():
    layer = torch.nn.Linear(1000, 50)
    update = lora.LowRank.new(layer.weight, 8, 8, 0)
    assert update.lora_A.shape == (8, 1000) and update.lora_B.shape == (50, 8)
    assert update.lora_A.std().item() == pytest.approx(1 / 8, rel=0.05) and not update.lora_B.any()


def test_targets(sd):
    networks = lora.networks(sd)
    assert len(lora.insert(networks, ["attention"], 2, 2)) == 7 * 8 + 2 * 4
    assert len(lora.insert(networks, ["attn2.to_k", "attn2.to_v"], 2, 2)) == 7 * 2
    assert len(lora.insert(networks, ["unet.conv_in", "conv_in"], 2, 2)) == 1
    for wrong in ("attn3", "o_q", ""):
        with pytest.raises(ValueError, match=f"--target_modules '{wrong}'"):
            lora.insert(networks, ["attention", wrong], 2, 2)


def test_merged_equals_beside(model):
    sd, _ = new(model, [*ALL, "conv_in", "conv_out"], rank=3, alpha=5.0)
    beside, plain = outputs(sd), outputs(fresh(model))
    assert not close(beside, plain, 0.01)
    assert close(outputs(with_weights(model, weights(sd))), beside)


def test_merging_rounds_once(model):
    sd, updates = new(model)
    sd.unet.half()
    for update in updates.values():
        update.float()
    expected = {
        n: (sd.unet.get_submodule(n.removeprefix("unet.")).weight.float() + u.delta()).half()
        for n, u in updates.items()
        if n.startswith("unet.")
    }
    merged = lora.merged(sd.unet)
    assert all(torch.equal(merged[f"{n.removeprefix('unet.')}.weight"], w) for n, w in expected.items())


def test_dropout_is_for_training(model, sd):
    updates = randomised(lora.insert(sd.unet, ["attention"], 4, 4, 0.5))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert torch.equal(*(sd.unet(x, torch.tensor([9]), context) for _ in range(2)))
    a, b = (sd.unet(x, torch.tensor([9]), context) for _ in range(2))
    assert not torch.allclose(a, b) and len(updates) == 56


def test_scales_and_sums(model, tmp_path):
    """The scale is the share of the update, and several add: W + s1 D1 + s2 D2."""
    for name, rank, alpha, seed in (("a", 4, 2.0, 1), ("b", 2, 6.0, 2)):
        lora.save(tmp_path / f"{name}.safetensors", new(model, rank=rank, alpha=alpha, seed=seed)[1])
    base = weights(fresh(model))

    def attached(**scales):
        sd = fresh(model)
        for name, scale in scales.items():
            sd.attach(tmp_path / f"{name}.safetensors", scale)
        return sd

    nothing = attached(a=0.0, b=0.0)
    assert all(torch.equal(x, y) for x, y in zip(outputs(nothing), outputs(fresh(model)), strict=True))
    whole = {n: weights(attached(**{n: 1.0})) for n in "ab"}
    delta = {n: {k: whole[n][k] - base[k] for k in base} for n in "ab"}
    assert sum(d.any().item() for d in delta["a"].values()) == 140
    for scales in ({"a": 0.5}, {"a": 1.0, "b": 1.0}, {"a": -0.3, "b": 0.7}):
        sd = attached(**scales)
        expected = {k: base[k] + sum(s * delta[n][k] for n, s in scales.items()) for k in base}
        assert same_weights(weights(sd), expected)
        plain = fresh(model)
        lora.networks(plain).load_state_dict(expected)
        for each in (sd, plain):  # some machines' fp32 rounding is over the bound by the last layer
            lora.networks(each).double()
        assert close(outputs(sd), outputs(plain))


def same_outputs(a, b):
    return [torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True)]


def test_scales_are_set_anew(model, sd, tmp_path):
    """The text encoder's by itself; 0 leaves nothing, to the bit; by path, by name, and of a folder."""
    a, b = tmp_path / "a.b.safetensors", tmp_path / "run" / "pytorch_lora_weights.safetensors"
    lora.save(a, new(model, alpha=2.0)[1])
    lora.save(b, new(model, ["attention"], alpha=6.0, seed=2)[1])
    plain = fresh(model)
    sd.attach(a, 1.0, text_scale=0.0)
    assert same_outputs(sd, plain) == [True, False]
    sd.rescale("a.b", 0.0, text_scale=0.7)
    assert same_outputs(sd, plain) == [False, False]  # the UNet sees another context
    sd.attach(b.parent, 0.0)
    sd.rescale(a, 0.0)
    assert same_outputs(sd, plain) == [True, True]
    for name in ("a.b", "a.b.safetensors"):
        sd.rescale(name, 0.5)
        sd.rescale("run", -0.3)
        other = fresh(model)
        other.attach(a, 0.5)
        other.attach(b, -0.3)
        assert same_outputs(sd, other) == [True, True]
        sd.rescale(name, 0)
        sd.rescale(b.parent, 0)
        assert same_outputs(sd, plain) == [True, True]


def test_scales_that_would_change_nothing(model, sd, tmp_path):
    lora.save(tmp_path / "both.safetensors", new(model, ["to_q", "q_proj"])[1])
    lora.save(tmp_path / "unet.safetensors", new(model, ["to_q"])[1])
    lora.save(tmp_path / "text.safetensors", new(model, ["q_proj"])[1])
    token_embedding.save(tmp_path / "word.safetensors", "<word>", torch.zeros(1, 32), {})
    for name, scales, message in [
        ("unet", (1, 0.5), "unet.safetensors changes nothing in the text encoder, so its scale 0.5 there"),
        ("text", (0.5, 1), "text.safetensors changes nothing in the UNet, so its scale 0.5 there"),
        ("word", (0.5,), "word.safetensors is an embedding: it has no scale, so 0.5 would"),
        ("both", (math.nan,), "nan is not a scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            sd.attach(tmp_path / f"{name}.safetensors", *scales)
        assert same_outputs(sd, fresh(model)) == [True, True] and not sd.attached
        sd.attach(tmp_path / f"{name}.safetensors", *[0] * (name != "word"))
        with pytest.raises(ValueError, match=message.replace(".safetensors", "")):
            sd.rescale(name, *scales)
        assert same_outputs(sd, fresh(model)) == [True, True]
        sd.attached.clear()
        sd = fresh(model)
    sd.tokenizer.placeholders.clear()


def test_names_of_what_is_attached(model, sd, tmp_path):
    for folder in "ab":
        lora.save(tmp_path / folder / "x.safetensors", new(model, ["to_q"])[1])
        sd.attach(tmp_path / folder, 0.5)
    for wrong in (tmp_path / "a", tmp_path / "a" / "x.safetensors"):
        with pytest.raises(ValueError, match="x.safetensors is attached already"):
            sd.attach(wrong)
    with pytest.raises(ValueError, match="^c is no adapter that is attached: .*/a, .*/b$"):
        sd.rescale("c", 1.0)
    (tmp_path / "c").mkdir()
    lora.save(tmp_path / "c" / "a.safetensors", new(model, ["to_k"])[1])
    sd.attach(tmp_path / "c" / "a.safetensors")
    with pytest.raises(ValueError, match="^a is the name of several adapters: "):
        sd.rescale("a", 1.0)


def test_a_folder_with_both_formats(model, sd, tmp_path):
    updates = new(model, ["to_q"])[1]
    lora.save(tmp_path / "w.safetensors", updates)
    torch.save(lora.state_dict(updates)[0], tmp_path / "w.bin")
    assert len(sd.attach(tmp_path)) == 1


def test_the_saved_model_has_it_in_its_weights(model, tmp_path):
    sd, _ = new(model)
    sd.save(tmp_path / "out")
    assert close(outputs(StableDiffusion.load(tmp_path / "out")), outputs(sd))
