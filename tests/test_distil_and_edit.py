"""Methods whose loss asks the model before training: their mathematics, written out with diffusers' UNet."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minisd import cli
from minisd.adapters import lora
from minisd.schedulers.lcm import consistency
from minisd.training.distributed import Processes
from minisd.training.latents import cache_latents
from tests.method_helpers import REWARD, Stream, assert_gradients, built, encode, new, pipeline, theirs_of

pytestmark = pytest.mark.parity
SHAPE = (4, 8, 8)


@pytest.fixture
def options(short_run):
    return lambda method, *flags: short_run(method, "--learning_rate", "1e-2", *flags)


def trained_further(m, trained: dict, pipe, size: float = 0.05):
    """Change what trains, and return diffusers' UNet with the same weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    theirs = copy.deepcopy(pipe.unet)
    theirs.load_state_dict(lora.merged(m.sd.unet))
    return theirs.requires_grad_(True)


def with_kind(pipe, kind: str, **more):
    """diffusers' DDIM for a prediction type."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind, clip_sample=False, **more)


# --- Latent consistency ------------------------------------------------------------------------------------


def test_the_consistency_function_is_the_identity_at_0():
    x, denoised = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(consistency(x, denoised, 0, 10.0), x)
    assert torch.allclose(consistency(x, denoised, 999, 10.0), denoised, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_lcm(model, options, train, kind):
    """Algorithm 1: the teacher's step by diffusers' DDIM, the consistency function by its LCM scheduler."""
    from diffusers import LCMScheduler

    flags = ["--train", train, "--prediction_type", kind, "--no-cache_latents", "--w_min", 1, "--w_max", 4]
    m, trained, batch = built("lcm", options("lcm", *flags, "--huber_c", 0.1), count=4)
    pipe = pipeline(model)
    student = trained_further(m, trained, pipe)
    loss = m.loss(batch)
    loss.backward()

    theirs, scheduler, lcm = theirs_of(pipe, m, batch), with_kind(pipe, kind), LCMScheduler()
    scheduler.set_timesteps(50)
    assert {t % 20 for t in theirs.timesteps.tolist()} == {19} and len(set(theirs.timesteps.tolist())) > 1
    w = m.inputs(batch)["w"]
    assert (w >= 1).all() and (w <= 4).all() and len(w.unique()) == len(w)

    def f(x, t):
        pred = student(x, t, theirs.context).sample
        rows = []
        for x_i, pred_i, t_i in zip(x, pred, t, strict=True):
            skip, out = lcm.get_scalings_for_boundary_condition_discrete(t_i)
            bar = scheduler.alphas_cumprod[t_i]
            x_0 = (x_i - (1 - bar).sqrt() * pred_i) / bar.sqrt()
            x_0 = x_0 if kind == "epsilon" else bar.sqrt() * x_i - (1 - bar).sqrt() * pred_i
            rows.append(skip * x_i + out * x_0)
        return torch.stack(rows)

    with torch.no_grad():
        empty = encode(pipe, [""] * 4)
        text, none = (pipe.unet(theirs.noisy, theirs.timesteps, c).sample for c in (theirs.context, empty))
        guided = text + w.view(-1, 1, 1, 1) * (text - none)
        steps = zip(guided, theirs.timesteps, theirs.noisy, strict=True)
        after = torch.stack([scheduler.step(pred, t, x).prev_sample for pred, t, x in steps])
        target = f(after, (theirs.timesteps - 20).clamp(min=0))
    expected = (((f(theirs.noisy, theirs.timesteps) - target) ** 2 + 0.1**2).sqrt() - 0.1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    if train == "full":
        assert_gradients(trained, student, "unet.")


def test_flags_of_updates_need_updates(options, capsys):
    for flag in (["--rank", 2], ["--alpha", 2], ["--target", "resnet"], ["--save_format", "kohya"]):
        with pytest.raises(SystemExit):
            options("lcm", "--train", "full", *flag)
        assert "is of low-rank updates, and --train full has none" in capsys.readouterr().err


def test_the_whole_unet_is_saved(options, tmp_path):
    from minisd.sampling.stable_diffusion import StableDiffusion

    m, trained, _ = built("lcm", options("lcm", "--train", "full"))
    with torch.no_grad():
        trained["unet.conv_in.weight"].add_(1)
    m.save(tmp_path / "full")
    saved = StableDiffusion.load(tmp_path / "full").unet.conv_in.weight
    assert torch.equal(saved, trained["unet.conv_in.weight"])
    assert "UNet" not in m.describe()


# --- Preferences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_dpo(model, options, train, kind):
    """Equation 14. Before the first update it is log 2, with a quarter of --beta_dpo times the gradient of
    the difference of the errors."""
    flags = ["--train", train, "--prediction_type", kind, "--no-cache_latents", "--beta_dpo", 300]
    m, trained, batch = built("dpo", options("dpo", *flags), count=3)
    pipe = pipeline(model)
    theirs, noise = theirs_of(pipe, m, batch), m.draw("noise", batch, SHAPE)
    for same in (theirs.timesteps, noise):
        assert torch.equal(same[:3], same[3:]) and len(same.unique(dim=0)) == 3
    assert not torch.equal(batch["pixels"][:3], batch["pixels"][3:])

    def errors(unet):
        return theirs.mse(unet(theirs.noisy, theirs.timesteps, theirs.context).sample)

    start = copy.deepcopy(pipe.unet).requires_grad_(True)
    before = errors(start)
    loss = m.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    (300 / 4 * (before[:3] - before[3:]).mean()).backward(inputs=list(start.parameters()), retain_graph=True)
    if train == "full":
        assert_gradients(trained, start, "unet.", within=1e-3)  # two errors nearly cancel
    for p in trained.values():
        p.grad = None

    policy = trained_further(m, trained, pipe)
    loss = m.loss(batch)
    loss.backward()
    change = errors(policy) - before.detach()
    expected = (1 + (300 / 2 * (change[:3] - change[3:])).exp()).log().mean()
    expected.backward()
    assert abs(expected.item() - math.log(2)) > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=3e-5)
    if train == "full":
        assert_gradients(trained, policy, "unet.", within=1e-3)
    (now,) = m.predict_before(theirs.noisy, theirs.timesteps, theirs.context)
    with torch.no_grad():
        assert torch.allclose(
            now, pipe.unet(theirs.noisy, theirs.timesteps, theirs.context).sample, atol=1e-5
        )


def labelled(folder, *labels) -> None:
    """Give the pairs of a folder these labels."""
    file = folder / "prompt.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"label_0": label} for row, label in zip(rows, labels, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("cached", ["--cache_latents", "--no-cache_latents"])
def test_labels_say_which_image_is_preferred(options, tmp_path, cached):
    """0 swaps a pair, and 0.5 leaves it out."""
    o = options("dpo", "--center_crop", "--label_column", "label_0", cached)
    m = new("dpo", replace(o, label_column=None))
    m.setup()
    plain = m.datasets()[0]
    labelled(tmp_path / "pairs", 1, 0, 0.5, "1.0")
    m = new("dpo", o)
    m.setup()
    data = m.datasets()[0]
    assert len(plain) == 4 and len(data) == 3 and len(data.views()) == 6
    stream = Stream(data, 0)
    if cached == "--cache_latents":
        cache_latents(stream, lambda pixels: (pixels, pixels), 2, Processes())
    shown = {pair[0]["prompt"]: pair for pair in (stream[i] for i in range(3))}
    assert shown.keys() == {"shape 0", "shape 1", "shape 3"}
    for i in range(4):
        first, second = plain.examples(i, torch.Generator())
        images = [plain.pixels(example.view) for example in (first, second)]
        for part, sample in enumerate(shown.get(first.prompt, [])):
            seen = sample.get("mean", sample.get("pixels"))
            assert torch.equal(seen, images[1 - part if first.prompt == "shape 1" else part])


@pytest.mark.parametrize(
    "labels, message",
    [
        ((1, 0, 2, 1), "--label_column label_0: source2.png has 2, not 0, 0.5 or 1"),
        ((0.5,) * 4, "--label_column label_0: .* has no pair with a preferred image"),
        (None, "--label_column label_0: .* has no such column, but source, target, prompt"),
    ],
)
def test_wrong_labels(options, tmp_path, labels, message):
    o = options("dpo", "--label_column", "label_0")
    if labels:
        labelled(tmp_path / "pairs", *labels)
    m = new("dpo", o)
    m.setup()
    with pytest.raises(ValueError, match=message):
        m.datasets()


# --- Erasing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xattn", "noxattn", "full"])
def test_erase(model, options, kind):
    """x_t by diffusers' DDIM with the trained network, and equation 5 with the frozen one."""
    flags = ["--erase", "a cat", "a dog", "--ddim_steps", 5, "--negative_guidance", 2, "--train_method", kind]
    m, trained, batch = built("erase", options("erase", *flags), count=6)
    names = {n.removeprefix("unet.") for n in trained}
    pipe = pipeline(model)
    cross = {n for n, _ in pipe.unet.named_parameters() if ".attn2." in n}
    assert {"xattn": names == cross, "noxattn": names and not names & cross, "full": names > cross}[kind]
    unet = trained_further(m, trained, pipe)
    loss = m.loss(batch)
    loss.backward()

    inputs, context, empty = m.inputs(batch), encode(pipe, batch["prompt"]), encode(pipe, [""])
    assert set(batch["prompt"]) == {"a cat", "a dog"}
    x, scheduler = m.draw("noise", batch, SHAPE), with_kind(pipe, "epsilon", steps_offset=1)
    scheduler.set_timesteps(5)
    assert len(inputs["timesteps"].unique()) > 2
    with torch.no_grad():
        found = 0
        for t in scheduler.timesteps:
            here = inputs["timesteps"] == t
            found += here.sum().item()
            assert torch.allclose(inputs["noisy"][here], x[here], atol=1e-4)
            text, none = (unet(x, t, c.expand(6, -1, -1)).sample for c in (context, empty))
            x = scheduler.step(none + 3 * (text - none), t, x).prev_sample
        assert found == 6
        noisy, timesteps = inputs["noisy"], inputs["timesteps"]
        text, none = (pipe.unet(noisy, timesteps, c.expand(6, -1, -1)).sample for c in (context, empty))
    expected = F.mse_loss(unet(noisy, timesteps, context).sample, none - 2 * (text - none))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    if kind == "full":
        assert_gradients(trained, unet, "unet.")


# --- Sliders -----------------------------------------------------------------------------------------------


def test_sliders(model, options):
    """Equation 8 in both directions: the updates as they are, and with the sign changed."""
    words = {"target": "a cat", "positive": "a big cat", "negative": "a small cat"}
    flags = [w for name, text in words.items() for w in (f"--{name}_prompt", text)]
    m, trained, batch = built("sliders", options("sliders", *flags, "--eta", 3, "--ddim_steps", 5), count=4)
    pipe = pipeline(model)
    up = trained_further(m, trained, pipe)
    down = copy.deepcopy(pipe.unet)
    with m.scaled(-1.0):
        down.load_state_dict(lora.merged(m.sd.unet))
    loss = m.loss(batch)
    inputs = m.inputs(batch)
    noisy, timesteps = inputs["noisy"], inputs["timesteps"]
    target, positive, negative = (encode(pipe, [text] * 4) for text in words.values())

    def pred(unet, context):
        return unet(noisy, timesteps, context).sample

    with torch.no_grad():
        middle, change = pred(pipe.unet, target), pred(pipe.unet, positive) - pred(pipe.unet, negative)
        errors = [
            F.mse_loss(pred(unet, target), middle + sign * 3 * change) for unet, sign in ((up, 1), (down, -1))
        ]
    assert loss.item() == pytest.approx(sum(errors).item() / 2, rel=1e-4)


# --- Rewards -----------------------------------------------------------------------------------------------


def rewarding(options, *flags) -> list:
    """The flags of a short run with rewards; two prompts of four images each make a batch."""
    common = ["--reward", REWARD, "--prompt", "a cat", "a dog", "--ddim_steps", 5, "--images_per_prompt", 4]
    return built("reward", options("reward", *common, *flags), count=2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_reward(options, model, kind, monkeypatch):
    """Trajectories and densities by diffusers' DDIM with an eta and torch's normal distribution, by the model
    at the start of the round; the clipped surrogate and the divergence by the trained one."""
    from minisd.sampling.stable_diffusion import StableDiffusion

    set_schedule = StableDiffusion.set_schedule
    monkeypatch.setattr(
        StableDiffusion, "set_schedule", lambda sd, **c: set_schedule(sd, prediction_type=kind, **c)
    )
    flags = ["--train", "full", "--eta", 0.7, "--start_guidance", 2, "--learned_steps", 3]
    m, trained, batch = rewarding(options, *flags, "--clip_range", 2e-4, "--kl_weight", 0.1)
    pipe = pipeline(model)
    policy = trained_further(m, trained, pipe, 2e-3)
    assert sorted(batch["prompt"]) == ["a cat"] * 4 + ["a dog"] * 4 and len(set(batch["number"])) == 8
    inputs = m.inputs(batch)
    loss = m.loss_of(inputs)
    loss.backward()

    scheduler = with_kind(pipe, kind, steps_offset=1)
    scheduler.set_timesteps(5)
    context, empty = encode(pipe, batch["prompt"]), encode(pipe, [""] * 8)
    noises = torch.stack([torch.randn(5, *SHAPE, generator=g) for g in m.generators("drawing", batch)], dim=1)

    def normal(unet, x, t) -> torch.distributions.Normal:
        text, none = (unet(x, t, c).sample for c in (context, empty))
        pred, zeros = none + 2 * (text - none), torch.zeros_like(x)
        mean, one_away = (
            scheduler.step(pred, t, x, eta=0.7, variance_noise=n).prev_sample for n in (zeros, zeros + 1)
        )
        return torch.distributions.Normal(mean, (one_away - mean).mean().detach())

    x, found, objective, clipped = m.draw("noise", batch, SHAPE), 0, 0, []
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        with torch.no_grad():
            old = normal(pipe.unet, x, t)
            new = old.loc + old.scale * noise
        own = normal(policy, x, t)
        ratio = (own.log_prob(new) - old.log_prob(new)).mean(dim=(1, 2, 3)).exp()
        surrogate = torch.min(
            ratio * inputs["advantage"], ratio.clamp(1 - 2e-4, 1 + 2e-4) * inputs["advantage"]
        )
        divergence = torch.distributions.kl_divergence(own, old).mean(dim=(1, 2, 3))
        rows, steps = (inputs["timesteps"] == t).nonzero(as_tuple=True)
        for row, step in zip(rows, steps, strict=True):
            assert torch.allclose(inputs["x"][row, step], x[row], atol=1e-4)
            assert torch.allclose(inputs["new"][row, step], new[row], atol=1e-4)
            density = old.log_prob(new)[row].mean()
            assert inputs["before"][row, step].item() == pytest.approx(density.item(), abs=2e-5)
            objective = objective + (0.1 * divergence[row] - surrogate[row]) / 24
            clipped.append(surrogate[row].item() != (ratio * inputs["advantage"])[row].item())
            found += 1
        x = new
    assert found == 24 and 0 < sum(clipped) < 24
    objective.backward()
    assert_gradients(trained, policy, "unet.", within=2e-3)  # what is near the clip's edge

    pixels = (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.clamp(-1, 1) + 1) / 2
    redness = pixels[:, 0].mean(dim=(1, 2)) - pixels[:, 1:].mean(dim=(1, 2, 3))
    assert loss.item() == pytest.approx(-redness.mean().item(), abs=2e-3)  # of 8 bits
    for prompt in ("a cat", "a dog"):
        own = inputs["advantage"][[p == prompt for p in batch["prompt"]]]
        theirs = redness[[p == prompt for p in batch["prompt"]]]
        expected = (theirs - theirs.mean()) / theirs.std(correction=0)
        assert torch.allclose(own, expected, atol=0.1) and abs(own.mean()) < 1e-5


def test_the_model_that_draws_is_that_of_the_round(options):
    """And the first update of a round has a ratio of 1."""
    m, trained, batch = rewarding(options, "--updates_per_round", 3)
    kept, drawn = [], []
    for step in range(4):
        m.before_update(step)
        inputs = m.inputs(batch)
        kept.append(torch.cat([t.flatten() for t in m.kept.values()]))
        drawn.append(inputs["new"])
        if step % 3 == 0:
            learned = [inputs[name][:, 0] for name in ("x", "new", "timesteps", "before")]
            assert m.surrogate(inputs, *learned, None).item() == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            torch._foreach_add_(list(trained.values()), 0.05)
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[2], kept[3])
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[2], drawn[3])
    m, _, batch = rewarding(options, "--updates_per_round", 1)
    assert not m.kept and torch.equal(m.inputs(batch)["new"], drawn[0])


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [1.0]", "ValueError: 1 numbers for 2 images"),
        ("return [float('nan')] * len(images)", "a number is not finite"),
        ("return images[0].nothing", "AttributeError"),
        ("return ['a'] * len(images)", "could not convert"),
        ("return iter(float, None)", "ValueError: 3 numbers for 2 images"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_reward_that_is_wrong_is_one_line(options, tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def reward(images, prompts):\n    {body}\n")
    flags = ["--reward", tmp_path / "mine.py", "--prompt", "a", "--images_per_prompt", 2, "--ddim_steps", 1]
    m, _, batch = built("reward", options("reward", *flags), count=1)
    with pytest.raises(ValueError, match=f"--reward .*mine.py: .*{message}"):
        m.inputs(batch)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--reward", "aesthetics", "--prompt", "a"], "unknown reward 'aesthetics'; give FILE.py"),
        (["--reward", REWARD], "give --prompt or --prompt_file"),
        (["--reward", REWARD, "--prompt", "a", "--prompt_file", "b"], "exclude each other"),
        (["--reward", REWARD, "--prompt", "a", "--images_per_prompt", "1"], "must be at least 2"),
        (["--reward", REWARD, "--prompt", "a", "--updates_per_round", "1", "--clip_range", "0.1"], "is 1"),
        (["--config", "run.toml", "--prompt", "a"], "is code: it runs only if the command line names it"),
    ],
)
def test_what_a_reward_needs(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "run.toml").write_text("reward = './evil.py'")
    with pytest.raises(SystemExit):
        cli.parse_train(["--method", "reward", *flags])
    assert message in capsys.readouterr().err


# --- What would teach nothing, in one line -----------------------------------------------------------------


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("erase", ["--erase", "a cat", " "], "--erase: an empty prompt leaves the model as it is"),
        ("sliders", ["--negative_prompt", "a big cat"], "are the same, so there is no direction"),
        ("erase", ["--ddim_steps", "1001"], "--ddim_steps 1001: the model has 1000 timesteps"),
    ],
)
def test_what_has_no_effect_is_refused(method, flags, message, short_run, capsys):
    own = {"sliders": ["--target_prompt", "a cat", "--positive_prompt", "a big cat"], "erase": []}[method]
    own += ["--erase", "x"] if method == "erase" and "--erase" not in flags else []
    with pytest.raises((SystemExit, ValueError)) as refused:
        built(method, short_run(method, *own, *flags))
    assert message in f"{refused.value} {capsys.readouterr().err}"


def test_lcm_needs_as_many_timesteps_as_it_skips_between(options):
    m, _, _ = built("lcm", options("lcm"))
    m.sd.set_schedule(num_train_timesteps=49)
    with pytest.raises(ValueError, match="lcm takes 50 of the model's timesteps .*, of 49"):
        m.timesteps({"number": [0]})
