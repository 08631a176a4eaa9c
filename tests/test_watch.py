"""A look inside while a picture is drawn, and the way from a picture back to its noise."""

import pytest
import torch

import minisd
from minisd import graph, ops
from minisd.options import TINY
from tests.test_graph import StandIn

FLAGS = {"steps": 4, "width": 32, "height": 48, "seed": 3}


@pytest.fixture(scope="module")
def sd():
    return minisd.load(TINY, device="cpu")


def draw(sd, prompt="a cat on a chair", **changes) -> bytes:
    (image,) = sd.generate(prompt, **FLAGS | changes)
    return image.tobytes()


def cross_attention(sd) -> list[str]:
    return [name for name, _ in sd.unet.named_modules() if name.endswith("attn2")]


def test_nothing_changes_where_nothing_is_replaced(sd):
    expected = draw(sd)
    with sd.watch("attn1|attn2|mid_block|conv_in", replace=lambda seen: None) as seen:
        assert draw(sd) == expected
    assert {s.kind for s in seen} == {"self", "cross", "features"}
    assert len(seen) == FLAGS["steps"] * (2 * len(cross_attention(sd)) + 2)
    assert draw(sd) == expected and ops.watcher is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sd.unet.modules())


def test_maps_of_every_layer_and_step(sd):
    with sd.watch() as seen:
        sd.generate(["a cat", "a dog"], batch_size=2, **FLAGS)
    layers, steps = cross_attention(sd), range(FLAGS["steps"])
    assert [(s.step, s.layer) for s in seen] == [(step, layer) for step in steps for layer in layers]
    times = [s.timestep for s in seen[:: len(layers)]]
    assert times == sorted(times, reverse=True) and len({*times}) == len(times)
    for s in seen:
        assert (s.kind, s.branches, s.size) == ("cross", 2, (12, 8)) and s.q is None
        assert s.value.shape == (2, 24, 16, 11)  # of both images, for the prompt alone
        torch.testing.assert_close(s.value.sum(dim=1), torch.ones(2, 16, 11))  # a place attends to 1 in all


def test_what_attention_is_given(sd):
    """Its output is that of the probabilities, for all heads and both branches; in the chosen steps alone."""

    def error(s):
        o = (s.probabilities @ s.v.transpose(1, 2)).transpose(1, 2)
        return (o - s.output).abs().max().item(), s.q.shape[0]

    with sd.watch("attn[12]", steps=[1, 3], keep=error) as seen:
        draw(sd)
    assert {s.step for s in seen} == {1, 3}
    assert all(off < 1e-5 and rows == 2 for off, rows in (s.value for s in seen))


def test_replacing(sd):
    """Of an output by an equal one changes nothing; by another one it does, in the chosen steps alone."""

    def same(s):
        return s.output.clone()

    def swapped(s):
        return s.output.flip(1)

    expected = draw(sd)
    with sd.watch(replace=same, keep=None):
        assert draw(sd) == expected
    with sd.watch(steps=[], replace=swapped, keep=None) as seen:
        assert draw(sd) == expected and not seen
    with sd.watch(replace=swapped, keep=None):
        changed = draw(sd)
    assert changed != expected
    with sd.watch("mid_block", replace=lambda s: torch.zeros_like(s.output), keep=None):
        assert draw(sd) not in (changed, expected)


def test_features_are_the_layer_s_output(sd):
    outputs = []
    hook = sd.unet.mid_block.register_forward_hook(lambda m, a, output: outputs.append(output))
    with sd.watch("mid_block") as seen:
        draw(sd)
    hook.remove()
    assert all(torch.equal(s.value, o) for s, o in zip(seen, outputs, strict=True))


def test_with_gradients_outside_sampling(sd):
    """The gradient of a map by the latents, as attend-and-excite takes it."""
    context = sd.encode_text(["a cat"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with sd.watch() as seen:
        pred = sd.predict(latents, 500, context)
        sd.predict(latents, 400, context)
    assert pred.shape == latents.shape and {(s.step, s.timestep) for s in seen} == {(0, 500), (0, 400)}
    assert {s.branches for s in seen} == {1}
    (gradient,) = torch.autograd.grad(seen[0].value[:, 2].amax(), latents)
    assert gradient.abs().max() > 0


def test_graphs_are_off_inside(sd, monkeypatch, capsys):
    expected = draw(sd)
    monkeypatch.setattr(graph, "backend", StandIn())
    graph.choose("auto")
    with sd.watch() as seen:
        assert draw(sd) == expected and len(seen) == 4 * len(cross_attention(sd))
    assert "graph: eager, hooks of modules run in Python" in capsys.readouterr().err
    monkeypatch.undo()
    graph.choose("auto")


def test_mistakes(sd):
    with pytest.raises(ValueError, match="no layer of the UNet has a name that ends in 'attn3'"):
        sd.watch("attn3").__enter__()
    for lists in ("attn3", "down_blocks", "ff"):
        with pytest.raises(ValueError, match="no layer of the UNet"):
            sd.watch(lists).__enter__()
    with sd.watch(), pytest.raises(ValueError, match="one at a time"):
        sd.watch().__enter__()
    with pytest.raises(ValueError, match="negative"):
        sd.predict(torch.zeros(1, 4, 8, 8), 1, sd.encode_text([""]), guidance_scale=2.0)


def test_layers_that_are_never_called_are_named(sd, capsys):
    """Keys of the text are computed before the first step, and norms in one operation with a sum."""
    name = "mid_block.attentions.0.transformer_blocks.0"
    expected = draw(sd)
    with sd.watch(rf"{name}\.attn2\.to_k|{name}\.norm3|{name}\.ff\.net") as seen:
        assert draw(sd) == expected
    assert {s.layer for s in seen} == {f"{name}.ff.net"} and len(seen) == FLAGS["steps"]
    assert f"watch: never called: {name}.attn2.to_k, {name}.norm3\n" in capsys.readouterr().err
    with sd.watch(steps=[]):
        draw(sd)
    assert "never called" not in capsys.readouterr().err


# ------------------------------ Inversion


def test_inversion_of_a_linear_network_is_exact():
    """Against the closed form: where the prediction is a x, a step of DDIM multiplies x by a known number."""
    from minisd.noise import NoiseSchedule
    from minisd.schedulers import ddim
    from minisd.schedulers._problem import Problem, read_settings

    a, schedule = 0.3, NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = read_settings(ddim, {"clip_sample": False, "set_alpha_to_one": False})
    given = {"schedule": schedule, "steps": 10, "generators": [], "settings": settings}
    problem = Problem(denoise=lambda x, t: a * x, noise=x, **given)
    *_, start = ddim.invert(problem, 60)
    factor = 1.0
    bars = schedule.alphas_cumprod.double()
    for t in range(900, -1, -100):
        now, after = bars[t], bars[max(t - 100, 0)]
        factor *= after.sqrt() * (1 - (1 - now).sqrt() * a) / now.sqrt() + (1 - after).sqrt() * a
    torch.testing.assert_close(start.double() * factor, x.double(), rtol=1e-4, atol=1e-4)
    *_, end = ddim.sample(Problem(denoise=lambda x, t: a * x, noise=start, **given))
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-4)


def psnr(a, b) -> float:
    return -10 * ((a - b).square().mean() / 4).log10().item()  # pixels are in [-1, 1]


def test_a_picture_comes_back(sd):
    """At 50 steps without guidance to 30 dB, and nearer with more iterations; compared as latents are
    decoded, since the autoencoder alone loses more."""
    prompt, flags = "3d emoji of a cat", {"steps": 50, "guidance_scale": 1.0, "scheduler": "ddim"}
    *_, latents = sd.steps(prompt, seed=1, **flags)
    expected, found = sd.decode(latents), []
    for iterations in (1, 2):
        noise = sd.invert(latents, prompt, iterations=iterations, steps=50)
        *_, again = sd.steps(prompt, noise=noise, **flags)
        found.append(psnr(sd.decode(again), expected))
    assert found[0] >= 30 and found[1] >= found[0] + 3, found
