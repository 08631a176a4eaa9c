"""Prompt syntax: spans, chunks and weights equal a reference written out by hand, and diffusers."""

import pytest
import torch

from minisd.adapters import token_embedding
from minisd.sampling import prompt
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.picture_helpers import psnr


@pytest.fixture(scope="module")
def sd(model):
    return StableDiffusion.load(model)


def chunks(sd, text, plain=False):
    return prompt.tokenize(sd.tokenizer, prompt.parse(text, plain))


def contexts(sd, texts, **settings):
    settings = Settings(**settings)
    return prompt.contexts(sd, prompt.prepare(sd, texts, settings), settings)


@pytest.mark.parametrize(
    "text, sections",
    [
        ("a cat, sitting", [[("a cat, sitting", 1)]]),
        ("", [[]]),
        ("a (cat) b", [[("a ", 1), ("cat", 1.1), (" b", 1)]]),
        ("a ((cat)) b", [[("a ", 1), ("cat", 1.21), (" b", 1)]]),
        ("a (cat:1.3) b", [[("a ", 1), ("cat", 1.3), (" b", 1)]]),
        ("a (cat: .5 )", [[("a ", 1), ("cat", 0.5)]]),
        ("(cat:-1)", [[("cat", -1)]]),
        ("a [cat] b", [[("a ", 1), ("cat", 1 / 1.1), (" b", 1)]]),
        ("(a [very] big (cat:1.5))", [[("a ", 1.1), ("very", 1), (" big ", 1.1), ("cat", 1.65)]]),
        (r"a \(cat\) \[b\] \\ c", [[(r"a (cat) [b] \ c", 1)]]),
        (r"(cat\), d:2)", [[("cat), d", 2)]]),
        ("a ) ] b: c", [[("a ) ] b: c", 1)]]),
        ("a :1.5) b", [[("a :1.5) b", 1)]]),
        ("ratio 16:9 (wide:1.2.3)", [[("ratio 16:9 ", 1), ("wide:1.2.3", 1.1)]]),
        ("a (cat, [dog", [[("a ", 1), ("cat, ", 1.1), ("dog", 1)]]),
        ("a (b)(c) (d:1.1)", [[("a ", 1), ("bc", 1.1), (" ", 1), ("d", 1.1)]]),
        ("a(b:1.0)c", [[("abc", 1)]]),
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("(a BREAK b:1.2) c", [[("a", 1.2)], [("b", 1.2), (" c", 1)]]),
        ("a\nBREAK\nBREAK b BREAKFAST break", [[("a", 1)], [("", 1)], [("b BREAKFAST break", 1)]]),
        ("<cat-toy> (<a>:2), “猫”", [[("<cat-toy> ", 1), ("<a>", 2), (", “猫”", 1)]]),
    ],
)
def test_spans(text, sections):
    got = prompt.parse(text).sections
    assert [[t for t, _ in s] for s in got] == [[t for t, _ in s] for s in sections]
    weights = [w for s in got for _, w in s]
    assert weights == pytest.approx([w for s in sections for _, w in s])


@pytest.mark.parametrize(
    "text, named",
    [
        ("a [cat:dog:0.5]", "[from:to:when]"),
        ("[red|blue] ball", "[a|b]"),
        ("a cat AND a dog", "AND"),
        ("<hypernet:x:1> a", "<hypernet:"),
    ],
)
def test_what_is_not_supported_is_refused(sd, text, named):
    with pytest.raises(ValueError) as e:
        prompt.parse(text)
    assert named in str(e.value) and "--plain_prompt" in str(e.value)
    assert chunks(sd, text, plain=True)


CAT, COMMA, START, END = 2368, 267, 49406, 49407
W = "cat "


def ids(chunk):
    return [i for i, _ in chunk]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", [[]]),
        (W * 75, [[CAT] * 75]),
        (W * 76, [[CAT] * 75, [CAT]]),
        (W * 160, [[CAT] * 75, [CAT] * 75, [CAT] * 10]),
        # The last comma is the 56th token: 19 stand behind it and move.
        (W * 55 + "," + W * 20, [[CAT] * 55 + [COMMA], [CAT] * 20]),
        # The 55th: 20 stand behind it, too far back.
        (W * 54 + "," + W * 21, [[CAT] * 54 + [COMMA] + [CAT] * 20, [CAT]]),
        (W * 74 + "," + W, [[CAT] * 74 + [COMMA], [CAT]]),
        # A comma that does not fit any more begins the next chunk, and does not count for it.
        (W * 75 + "," + W * 75, [[CAT] * 75, [COMMA] + [CAT] * 74, [CAT]]),
        (W * 60 + "," + W * 14 + "," + W, [[CAT] * 60 + [COMMA] + [CAT] * 14, [COMMA, CAT]]),
        (W + "BREAK " + W * 2, [[CAT], [CAT] * 2]),
        (W * 75 + "BREAK " + W, [[CAT] * 75, [CAT]]),
        ("BREAK " + W, [[], [CAT]]),
        (W + "BREAK", [[CAT]]),
        (W + "BREAK BREAK " + W, [[CAT], [], [CAT]]),
        ("BREAK", [[]]),
    ],
)  # fmt: skip
def test_chunks(sd, text, expected):
    got = chunks(sd, text)
    assert [ids(chunk) for chunk in got] == [
        [START, *content, *[END] * (75 - len(content)), END] for content in expected
    ]


@pytest.mark.parametrize("text", ["a \udcff", "\ud800"])
def test_what_is_no_text_is_refused(sd, text):
    """Bytes of a command line that are not in UTF-8 are surrogates in Python; PNGs cannot have them."""
    for read in (lambda text: sd.tokenizer([text]), lambda text: chunks(sd, text)):
        with pytest.raises(ValueError, match="a prompt not in UTF-8: '.*\\\\u"):
            read(text)


def test_weights_stay_with_their_tokens(sd):
    (chunk,) = chunks(sd, "a (cat:1.5), [dog")
    assert [w for _, w in chunk] == pytest.approx([1, 1, 1.5, 1, 1 / 1.1, *[1] * 72])
    first, second = chunks(sd, f"{W * 70}, (b b b b b b:2)")
    # The comma is the 71st token: four of the weighted ones stood behind it in the first chunk.
    assert [w for _, w in first] == [1] * 77
    assert [w for _, w in second] == [1, *[2] * 6, *[1] * 70]


def test_embeddings_are_not_cut_apart(model, tmp_path):
    sd = StableDiffusion.load(model)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    token_embedding.save(tmp_path / "toy.safetensors", "<toy>", rows, {})
    sd.attach(tmp_path / "toy.safetensors")
    toy = [49408 + i for i in range(5)]
    (chunk,) = chunks(sd, "(a <toy>:1.5)")
    assert ids(chunk)[:7] == [START, 320, *toy] and [w for _, w in chunk][:8] == [1, *[1.5] * 6, 1]
    first, second = chunks(sd, f"{W * 71} <TOY> cat")
    assert ids(first) == [START, *[CAT] * 71, *[END] * 5]
    assert ids(second)[:8] == [START, *toy, CAT, END]
    assert len(chunks(sd, f"{W * 70} <toy>")) == 1
    # Full, and a comma near: what stands behind it goes along.
    _, second = chunks(sd, f"{W * 72}, {W * 2} <toy>")
    assert ids(second)[:9] == [START, CAT, CAT, *toy, END]
    sd.tokenizer.add_placeholder("<long>", 76)
    with pytest.raises(ValueError, match="76 vectors.*75"):
        chunks(sd, "<long>")


def reference(sd, text_chunks, skip=1):
    """Each chunk by itself, through the layers one by one; weights by A1111's first rule."""
    parts = []
    for tokens, weights in text_chunks:
        tokens = [START, *tokens, *[END] * (76 - len(tokens))]
        weights = [1.0, *weights, *[1.0] * (76 - len(weights))]
        model = sd.text_encoder.text_model
        x = model.embeddings(torch.tensor([tokens]))
        states = [x]
        for layer in model.encoder["layers"]:
            states.append(layer(states[-1]))
        z = model.final_layer_norm(states[-skip])
        mean = z.mean()
        z = z * torch.tensor(weights)[None, :, None]
        parts.append(z * (mean / z.mean()))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_context_equals_the_reference(sd):
    text = f"a (cat:1.4) [cat] {W * 80}"
    dark = 1 / 1.1
    written = [([320, CAT, CAT, *[CAT] * 72], [1, 1.4, dark, *[1] * 72]), ([CAT] * 8, [1] * 8)]
    for skip in (1, 2):
        context, negative = contexts(sd, [text, "(cat:0.5)"], negative_prompt="bad", clip_skip=skip)
        assert context.shape == negative.shape == (2, 154, 32)
        assert torch.allclose(context[:1], reference(sd, written, skip), atol=1e-5)
        # The shorter ones are filled up with an empty chunk.
        assert torch.allclose(context[1:], reference(sd, [([CAT], [0.5]), ([], [])], skip), atol=1e-5)
        assert torch.allclose(negative[1:], reference(sd, [([2103], [1]), ([], [])], skip), atol=1e-5)
    assert sd.tokenizer.encode("bad") == [2103]


@torch.no_grad()
def test_without_syntax_nothing_changes(sd):
    texts = ["a photo of a cat, 4k!", "", W * 75]
    for plain in (False, True):
        context, negative = contexts(sd, texts, negative_prompt="ugly: bad", plain_prompt=plain)
        assert torch.equal(context, sd.encode_text(texts))
        assert torch.equal(negative, sd.encode_text(["ugly: bad"] * 3))
    context, none = contexts(sd, ["a (cat:1.5)" + W * 100], plain_prompt=True, guidance_scale=1.0)
    assert torch.equal(context, sd.encode_text(["a (cat:1.5)" + W * 100])) and none is None


@pytest.mark.parametrize("flag", ["clip_skip", "negative_clip_skip"])
@pytest.mark.parametrize("skip, message", [(0, "must be positive"), (3, "3: .*2 layers")])
def test_clip_skip_out_of_range(sd, flag, skip, message):
    with pytest.raises(ValueError, match=f"--{flag} {message}"):
        contexts(sd, ["a"], **{flag: skip})


@pytest.mark.parity
def test_clip_skip_equals_diffusers(sd, model):
    """Whose clip_skip=1 is our 2: hidden_states[-2], which it takes by itself with older transformers. It
    skips for the prompt alone, as we do with negative_clip_skip=1; A1111 skips for both."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer(["a photo of a cat", "ugly"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        last, skipped = (pipe.text_encoder.final_layer_norm(states[-n]) for n in (1, 2))
    cases = {(1, None): (last, last), (2, None): (skipped, skipped), (2, 1): (skipped, last)}
    cases[1, 2] = last, skipped
    drawn, expected = {}, {}
    for (skip, of_negative), (positive, negative) in cases.items():
        settings = Settings(width=32, height=32, steps=8, negative_prompt="ugly", clip_skip=skip)
        settings.negative_clip_skip = of_negative
        drawn[skip, of_negative] = next(pictures(sd, ["a photo of a cat"], [3], settings))
        expected[skip, of_negative] = pipe(
            prompt_embeds=positive[:1], negative_prompt_embeds=negative[1:], width=32, height=32,
            num_inference_steps=8, generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
    for a in cases:
        assert all((psnr(drawn[a], expected[b]) >= 50) == (a == b) for b in cases)


def test_a_picture_does_not_depend_on_longer_neighbours(sd):
    settings = Settings(width=32, height=32, steps=4)
    texts, seeds = ["a cat", W * 100, "a (dog:1.3)"], [1, 2, 3]
    together = list(pictures(sd, texts, seeds, settings, batch_size=3))
    for text, seed, image in zip(texts, seeds, together, strict=True):
        assert psnr(image, next(pictures(sd, [text], [seed], settings))) >= 60


@pytest.mark.parametrize(
    "text, rest, loras",
    [
        ("a cat", "a cat", {}),
        ("a <lora:x:0.8> cat<lora:y>", "a  cat", {"x": (0.8, 0.8), "y": (1, 1)}),
        ("<lora:x:0.5:0.25>a", "a", {"x": (0.5, 0.25)}),
        ("<lora:x v1.5:-1>a", "a", {"x v1.5": (-1, -1)}),
        ("<lora:x:te=0.5:unet=2>a<lyco:z:1>", "a", {"x": (0.5, 2), "z": (1, 1)}),
        ("<lora:x:0.5><lora:x:0.25:1>", "", {"x": (0.75, 1.5)}),
        ("a <toy> <lora>", "a <toy> <lora>", {}),
    ],
)
def test_loras_are_taken_out(text, rest, loras):
    parsed = prompt.parse(text)
    assert ("".join(span for span, _ in parsed.sections[0]), parsed.loras) == (rest, loras)


@pytest.mark.parametrize("inside", ["x:much", ":1", "x:1:2:3", "x:dyn=4"])
def test_wrong_loras(inside):
    with pytest.raises(ValueError, match="<lora:NAME:SCALE>") as e:
        prompt.parse(f"a <lora:{inside}>")
    assert f"<lora:{inside}>" in str(e.value)
