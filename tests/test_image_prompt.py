"""IP-Adapter and T2I-Adapter: they equal diffusers, and are refused where they do not fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minisd
from minisd import graph
from minisd.adapters import ip_adapter, lora, t2i_adapter
from minisd.formats import hub, parts
from minisd.formats.diffusers import save_part
from minisd.models import controlnet, unet
from minisd.sampling import image_prompt
from minisd.sampling.generate import Denoiser, Settings, pictures, text_branches
from tests.helpers import TINY_UNET, assert_close, diffusers_unet, same_weights
from tests.method_helpers import shake
from tests.picture_helpers import photo, psnr
from tests.test_graph import StandIn

EMBEDDING, HIDDEN, WIDTH = 24, 32, 32  # of the encoder; of the text states
INNER = 64  # of the resampler: one head


def tensors_of(model, kind: str = "basic") -> dict[str, torch.Tensor]:
    """A file of random weights for the tiny model, with the published names."""
    sd = minisd.load(model)
    g = torch.Generator().manual_seed(0)
    modules = [(n, m) for n, m in sd.unet.named_modules() if n.endswith("attn2")]
    order = [pair for part in ("down", "up", "mid") for pair in modules if pair[0].startswith(part)]
    shapes = {
        f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight": (m.to_q.out_features, WIDTH)
        for i, (_, m) in enumerate(order)
        for kind in "kv"
    }
    c, layer = 16, "image_proj.layers.{}."
    shapes |= {
        "basic": {
            "image_proj.proj.weight": (4 * WIDTH, EMBEDDING), "image_proj.proj.bias": (4 * WIDTH,),
            "image_proj.norm.weight": (WIDTH,), "image_proj.norm.bias": (WIDTH,),
        },
        "full": {
            "image_proj.proj.0.weight": (HIDDEN, HIDDEN), "image_proj.proj.0.bias": (HIDDEN,),
            "image_proj.proj.2.weight": (WIDTH, HIDDEN), "image_proj.proj.2.bias": (WIDTH,),
            "image_proj.proj.3.weight": (WIDTH,), "image_proj.proj.3.bias": (WIDTH,),
        },
        "plus": {
            "image_proj.latents": (1, 6, c),
            "image_proj.proj_in.weight": (c, HIDDEN), "image_proj.proj_in.bias": (c,),
            "image_proj.proj_out.weight": (WIDTH, c), "image_proj.proj_out.bias": (WIDTH,),
            "image_proj.norm_out.weight": (WIDTH,), "image_proj.norm_out.bias": (WIDTH,),
        } | {
            layer.format(i) + name: shape for i in range(4) for name, shape in {
                "0.norm1.weight": (c,), "0.norm1.bias": (c,), "0.norm2.weight": (c,), "0.norm2.bias": (c,),
                "0.to_q.weight": (INNER, c), "0.to_kv.weight": (2 * INNER, c), "0.to_out.weight": (c, INNER),
                "1.0.weight": (c,), "1.0.bias": (c,), "1.1.weight": (4 * c, c), "1.3.weight": (c, 4 * c),
            }.items()
        },
    }[kind]  # fmt: skip
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def nested(tensors: dict) -> dict[str, dict]:
    found = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = tensor
    return found


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Files of each kind, and the image encoder beside them."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("ip")
    for kind in ("basic", "full", "plus"):
        save_file(tensors_of(model, kind), folder / f"{kind}.safetensors")
    torch.save(nested(tensors_of(model)), folder / "basic.bin")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=16, projection_dim=EMBEDDING,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return folder


def theirs(model, folder, kinds, scales, images, settings, further=None, **given):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    parts = {"image_encoder": CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")}
    parts["feature_extractor"] = CLIPImageProcessor(size=32, crop_size=32)
    parts |= further or {}
    kind = parts.pop("kind", StableDiffusionPipeline)
    pipe = kind.from_pretrained(model, safety_checker=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    files = [nested(load_file(folder / f"{kind}.safetensors")) for kind in kinds]
    pipe.load_ip_adapter(files, subfolder="", weight_name=[""] * len(files))
    pipe.set_ip_adapter_scale(scales)
    return pipe(
        "a cat", negative_prompt="ugly", width=40, height=32, num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale, ip_adapter_image=images,
        generator=torch.Generator().manual_seed(3), **given,
    ).images[0]  # fmt: skip


SETTINGS = Settings(width=40, height=32, steps=6, negative_prompt="ugly", guidance_scale=5.0)


@pytest.mark.parity
@pytest.mark.parametrize(
    "kinds, scales, guidance",
    [
        (["basic"], [0.7], 5.0),
        (["basic"], [0.7], 1.0),
        (["plus"], [1.0], 5.0),
        (["full"], [0.5], 5.0),
        (["basic", "plus"], [0.4, 0.9], 5.0),
    ],
)
def test_pictures_equal_diffusers(model, folder, kinds, scales, guidance):
    settings = replace(SETTINGS, guidance_scale=guidance)
    images = [photo(i, (60, 45)) for i in range(len(kinds))]
    expected = theirs(model, folder, kinds, scales, images, settings)
    sd = minisd.load(model)
    for kind, scale in zip(kinds, scales, strict=True):
        sd.attach(folder / f"{kind}.safetensors", scale)
    prompt = image_prompt.project(sd, images)
    drawn = list(pictures(sd, ["a cat"] * 2, [3, 4], settings, image_prompt=prompt, batch_size=2))
    (plain,) = pictures(minisd.load(model), ["a cat"], [3], settings)
    assert psnr(drawn[0], expected) >= 60 and psnr(drawn[0], plain) < 45
    flags = {"width": 40, "height": 32, "steps": 6, "negative_prompt": "ugly", "guidance_scale": guidance}
    again = sd.generate("a cat", seed=3, num_images=2, image_prompt=images, **flags)
    assert all(psnr(a, b) >= 60 for a, b in zip(again, drawn, strict=True))  # one at a time


@pytest.mark.parity
@pytest.mark.parametrize("size", [(60, 45), (33, 90), (32, 32)], ids=str)
def test_the_encoder_s_input_is_clip_s(size):
    from transformers import CLIPImageProcessor

    expected = CLIPImageProcessor(size=32, crop_size=32)(photo(1, size), return_tensors="pt").pixel_values
    assert_close(image_prompt.clip_pixels(photo(1, size), 32), expected, 1e-6)
    with pytest.raises(ValueError, match="--image_prompt: 1x101 is too narrow"):
        image_prompt.clip_pixels(Image.new("RGB", (1, 101)), 32)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["basic", "plus", "full"])
def test_predictions_equal_diffusers(model, folder, kind):
    """The UNet's, for an image and for none, with guidance."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet._load_ip_adapter_weights([nested(load_file(folder / f"{kind}.safetensors"))])
    sd, g = minisd.load(model), torch.Generator().manual_seed(2)
    sd.attach(folder / f"{kind}.safetensors")
    (adapter,) = (a for attached in sd.attached.values() for a in attached.adapters)
    states = image_prompt.embed(sd, adapter.image_prompt, photo(0), None).detach()  # image, none
    x, context = torch.randn(1, 4, 8, 12, generator=g), torch.randn(2, 77, WIDTH, generator=g)
    branches = text_branches(context[1:], context[:1], 3.0)
    with torch.no_grad():
        ours = Denoiser(sd.unet, branches, image_prompt=image_prompt.project(sd, [photo(0)]))(x, 500)
        added = {"image_embeds": [states.flip(0)[:, None]]}
        preds = unet(x.repeat(2, 1, 1, 1), 500, context, added_cond_kwargs=added).sample
        plain = Denoiser(minisd.load(model).unet, branches)(x, 500)
    assert_close(ours, preds[:1] + 3 * (preds[1:] - preds[:1]), 2e-5)
    assert (ours - plain).abs().max() > 0.01


FLAGS = {"prompt": "a cat", "steps": 3, "width": 32, "height": 32, "image_prompt": photo(0)}


def test_scales_and_files(model, folder):
    """At scale 0 an image is the same to the byte, with and without an image prompt."""
    sd, without = minisd.load(model), {n: v for n, v in FLAGS.items() if n != "image_prompt"}
    (plain,) = sd.generate(**without)
    print(sd.attach(folder / "basic.safetensors"))
    (full,) = sd.generate(**FLAGS)
    assert psnr(full, plain) < 45
    needs = "basic.safetensors is an IP-Adapter: it needs an image .--image_prompt"
    with pytest.raises(ValueError, match=needs):
        sd.generate(**without)
    with pytest.raises(ValueError, match=needs):
        sd.predict(torch.zeros(1, 4, 8, 8), 5, sd.encode_text(["a cat"]))
    with pytest.raises(ValueError, match="a file of its own"):
        sd.export(folder / "merged.safetensors")
    sd.rescale("basic", 0)
    assert sd.generate(**FLAGS)[0].tobytes() == plain.tobytes() == sd.generate(**without)[0].tobytes()
    sd.rescale("basic", 1)
    assert sd.generate(**FLAGS)[0].tobytes() == full.tobytes()
    other = minisd.load(model)
    other.attach(folder / "basic.bin")
    assert other.generate(**FLAGS)[0].tobytes() == full.tobytes()
    attend = other.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    lora.put(lora.networks(other), {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k":
                                    lora.LowRank.new(attend.to_k.weight, 2, 2.0, 0.0)})  # fmt: skip
    assert other.generate(**FLAGS)[0].tobytes() == full.tobytes()  # a LoRA of zero beside it
    with other.watch("attn2", keep=lambda s: s.k.shape[1]) as seen:
        assert other.generate(**FLAGS)[0].tobytes() == full.tobytes()
    assert {s.value for s in seen} == {77} and len(seen) == 3 * 7


def test_graphs_replay_it(model, folder, monkeypatch):
    """Another image needs no recording of its own; another scale does."""
    sd = minisd.load(model)
    sd.attach(folder / "basic.safetensors")

    def draw(number: int) -> bytes:
        return sd.generate(**FLAGS | {"image_prompt": photo(number), "steps": 5})[0].tobytes()

    expected = [draw(0), draw(1)]
    backend = StandIn()
    monkeypatch.setattr(graph, "backend", backend)
    graph.choose("auto")
    assert [draw(0), draw(1)] == expected and expected[0] != expected[1]
    assert backend.recorded == 1 and backend.replays > 5
    sd.rescale("basic", 0.5)
    assert draw(0) != expected[0] and backend.recorded == 2
    graph.forget()


def test_the_command(model, folder, tmp_path, command):
    """--like takes the adapter, its scale, the image and the encoder."""
    photo(0).save(tmp_path / "photo.png")
    save_file(load_file(folder / "basic.safetensors"), tmp_path / "ip.safetensors")
    base = ["sample.py", "--model", model, "--prompt", "a cat", "--steps", 3, "--output", tmp_path / "out"]
    flags = [
        *base,
        "--adapter",
        f"{tmp_path / 'ip.safetensors'}:0.6",
        "--image_prompt",
        tmp_path / "photo.png",
    ]
    encoder = ["--image_encoder", folder / "image_encoder"]
    status, out, err = command(*flags, *encoder)
    assert status == 0 and "IP-Adapter on 7 cross-attentions" in err, err
    first = Image.open(out.split()[0])
    again = command("sample.py", "--like", out.split()[0], "--output", tmp_path / "again")
    assert Image.open(again[1].split()[0]).tobytes() == first.tobytes()
    status, out, err = command(*base)
    assert Image.open(out.split()[0]).tobytes() != first.tobytes()
    for message, *more in (
        ("ip.safetensors needs --image_encoder: there is no folder image_encoder beside it", *flags),
        ("1 --image_prompt and 0 IP-Adapters among --adapter (none): give", *base, *flags[-2:], *encoder),
        ("2 --image_prompt and 1 IP-Adapters among --adapter (ip.safetensors)", *flags, *flags[-2:]),
        ("ip.safetensors is an IP-Adapter: it needs an image (--image_prompt)", *flags[:-2]),
        ("--image_encoder needs --image_prompt", *base, *encoder),
        ("--image_encoder nowhere: ", *flags, "--image_encoder", "nowhere"),
        ("no-photo.png", *flags[:-1], tmp_path / "no-photo.png", *encoder),
    ):
        status, _, err = command(*more)
        assert status == 2 and message in err and "Traceback" not in err, err


def test_what_does_not_fit_is_refused(model, folder, tmp_path):
    whole = load_file(folder / "basic.safetensors")

    def without(*starts) -> dict:
        return {n: t for n, t in whole.items() if not n.startswith(starts)}

    sd = minisd.load(model)
    for message, tensors in (
        ("for 6 attentions to tokens of width 32; this UNet has 7, of width 32", without("ip_adapter.13.")),
        ("1 missing .ip_adapter.13.to_v_ip.weight", without("ip_adapter.13.to_v")),
        ("attentions to tokens of width 64",
         {n: torch.cat([t, t], -1) if "_ip" in n else t for n, t in whole.items()}),
        ("FaceID is not read", without("image_proj.proj.") | {"image_proj.proj.0.weight": torch.zeros(4, 4)}),
        ("1 unknown .image_proj.more", whole | {"image_proj.more": torch.zeros(1)}),
        ("tensors of another shape: ip_adapter.1.to_k_ip.weight",
         whole | {"ip_adapter.1.to_k_ip.weight": torch.zeros(5, WIDTH)}),
        ("not the layout of an IP-Adapter", without("image_proj.norm")),
    ):  # fmt: skip
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
            sd.attach(tmp_path / "x.safetensors")
    wide = {n: torch.cat([t, t], -1) if n == "image_proj.proj.weight" else t for n, t in whole.items()}
    save_file(wide, tmp_path / "x.safetensors")
    sd.attach(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="image_encoder: embeddings of width 24, and x.safetensors takes 48"):
        sd.generate(**FLAGS, image_encoder=str(folder / "image_encoder"))
    with pytest.raises(ValueError, match="x.safetensors is no model: sample.py takes it by --adapter"):
        minisd.load(tmp_path / "x.safetensors")


@pytest.mark.parity
def test_with_a_controlnet_it_equals_diffusers(model, folder, tmp_path):
    """The ControlNet sees the text alone."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    sd, hint = minisd.load(model), photo(1, (40, 32))
    network = controlnet.ControlNet.from_unet(sd.unet, downscale=4)
    shake(network, 0.1)
    save_part(tmp_path / "net", network)
    kind, more = StableDiffusionControlNetPipeline, {"image": hint, "controlnet_conditioning_scale": 0.8}
    with_net = {"kind": kind, "controlnet": ControlNetModel.from_pretrained(tmp_path / "net")}
    expected = theirs(model, folder, ["basic"], [0.7], [photo(0)], SETTINGS, with_net, **more)
    sd.attach(folder / "basic.safetensors", 0.7)
    flags = {"width": 40, "height": 32, "steps": 6, "negative_prompt": "ugly", "guidance_scale": 5.0}
    flags |= {"seed": 3, "image_prompt": photo(0)}
    steered = {"controlnet": f"{tmp_path / 'net'}:0.8", "control_image": hint}
    (drawn,) = sd.generate("a cat", **flags, **steered)
    assert psnr(drawn, expected) >= 60
    assert psnr(drawn, sd.generate("a cat", **flags)[0]) < 45


def test_the_numbers_of_sd15():
    """As published: 1 to 31, of which the last is the middle's."""
    with torch.device("meta"), parts._NoInit():
        sd = SimpleNamespace(unet=unet.UNet(unet.SD15), device=torch.device("meta"))
        widths = [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]
        tensors = {f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight": torch.empty(width, 768)
                   for i, width in enumerate(widths) for kind in "kv"}  # fmt: skip
        shapes = {
            "proj.weight": (3072, 1024),
            "proj.bias": (3072,),
            "norm.weight": (768,),
            "norm.bias": (768,),
        }
        tensors |= {f"image_proj.{name}": torch.empty(shape) for name, shape in shapes.items()}
    updates = ip_adapter.read(sd, tensors, {}, "ip-adapter_sd15.safetensors").updates
    assert len(updates) == 16 and list(updates)[-1].startswith("unet.mid_block.")


def test_an_encoder_in_a_folder_of_a_repository(monkeypatch):
    import transformers

    def found(name, **more):
        return name, more.get("subfolder"), more["local_files_only"]

    monkeypatch.setattr(transformers.CLIPVisionModelWithProjection, "from_pretrained", found)
    for source, expected in (("a/b", ("a/b", None, False)), ("a/b/c/d", ("a/b", "c/d", False))):
        assert hub.pretrained(["CLIPVisionModelWithProjection"], source, "image_encoder") == [expected]


# T2I-Adapter


def adapter_of(config, hint_channels=3, downscale=8, light=False):
    """diffusers' network with random weights, for a UNet of this config."""
    from diffusers import T2IAdapter

    torch.manual_seed(0)
    channels = list(config.block_out_channels)
    kind = {"adapter_type": "light_adapter", "num_res_blocks": 4} if light else {"num_res_blocks": 2}
    network = T2IAdapter(
        hint_channels, channels[:-1] if light else channels, downscale_factor=downscale, **kind
    )
    return network.eval().requires_grad_(False)


def authors(network, light: bool) -> dict[str, torch.Tensor]:
    """Its tensors by the names of the authors' files."""
    found = {}
    for name, tensor in network.adapter.state_dict().items():
        level, _, rest = name.removeprefix("body.").partition(".")
        if name.startswith("body.") and light:
            name = name.replace(".resnets.", ".body.")
        elif name.startswith("body."):
            row, _, end = (
                rest.removeprefix("resnets.").partition(".") if "resnets" in rest else ("0", "", rest)
            )
            name = f"body.{2 * int(level) + int(row)}.{end}"
        found[name] = tensor
    return found


@pytest.mark.parity
@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("hint_channels, size", [(3, (16, 24)), (1, (9, 14))], ids=str)
def test_the_network_and_the_unet_equal_diffusers(light, hint_channels, size):
    """From both layouts; at odd sizes, where levels are rounded up; with a ControlNet's residuals, too."""
    config = replace(TINY_UNET, block_out_channels=(32, 64, 64))
    network = adapter_of(config, hint_channels, light=light)
    g = torch.Generator().manual_seed(1)
    hint = torch.rand(2, 1, 8 * size[0], 8 * size[1], generator=g).expand(-1, 3, -1, -1)
    if hint_channels == 3:
        hint = hint * torch.rand(2, 3, 1, 1, generator=g)
    expected = network(hint[:, :hint_channels])
    loaded = [t2i_adapter.load(tensors, config, 8, "x")
              for tensors in (network.state_dict(), authors(network, light))]  # fmt: skip
    for ours in loaded:
        features = ours.prepare(hint)
        assert len(features) == len(expected) == 3
        for a, b in zip(features, expected, strict=True):
            assert_close(a, b, 1e-5)
    torch.manual_seed(0)
    our_unet, their_unet = unet.UNet(config), diffusers_unet(config)
    same_weights(our_unet, their_unet)
    x, t = torch.randn(2, 4, *size, generator=g), torch.tensor([7, 981])
    context = torch.randn(2, 5, 24, generator=g)
    _, skips, _ = our_unet.encode(x, t, context)
    down, mid = (
        [0.3 * torch.randn(s.shape, generator=g) for s in skips],
        torch.randn(2, 64, 1, 1, generator=g),
    )
    scaled = ours(x, t, context, features, 0.7)
    for more in ({}, {"down_residuals": down, "mid_residual": mid}):
        pred = our_unet(x, t, context, **controlnet.total([scaled, *([more] if more else [])], 2))
        control = (
            {"down_block_additional_residuals": down, "mid_block_additional_residual": mid} if more else {}
        )
        added = {"down_intrablock_additional_residuals": [0.7 * f for f in expected], **control}
        assert_close(pred, their_unet(x, t, context, **added).sample, 2e-5)
    assert (pred - our_unet(x, t, context)).abs().max() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize("count", [1, 2])
def test_t2i_pictures_equal_diffusers(model, tmp_path, count, monkeypatch, command):
    import diffusers

    config = minisd.load(model).unet.config
    networks = [adapter_of(config, downscale=4, light=light) for light in (False, True)][:count]
    with torch.no_grad():
        for p in (p for network in networks for p in network.parameters()):
            p.mul_(3)
    networks[0].save_pretrained(tmp_path / "0")
    for i, network in enumerate(networks[1:], 1):
        save_file(authors(network, True), tmp_path / f"{i}.safetensors")
    hints = [photo(i, (40, 32)) for i in range(count)]
    pipe = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        model, adapter=networks[0] if count == 1 else networks, safety_checker=None
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a cat", image=hints[0] if count == 1 else hints, negative_prompt="ugly", width=40, height=32,
        num_inference_steps=6, guidance_scale=5.0, generator=torch.Generator().manual_seed(3),
        adapter_conditioning_scale=[0.9, 0.6][:count] if count > 1 else 0.9,
    ).images[0]  # fmt: skip
    flags = ["--model", model, "--prompt", "a cat", "--negative_prompt", "ugly", "--steps", 6, "--seed", 3,
             "--guidance_scale", 5, "--output", tmp_path / "out"]  # fmt: skip
    sources = [tmp_path / "0", tmp_path / "1.safetensors"][:count]
    for i, hint in enumerate(hints):
        hint.save(tmp_path / f"hint{i}.png")
        flags += [
            "--controlnet",
            f"{sources[i]}:{(0.9, 0.6)[i]}",
            "--control_image",
            tmp_path / f"hint{i}.png",
        ]
    status, out, err = command("sample.py", *flags)
    assert status == 0, err
    drawn = Image.open(out.split()[0])
    assert psnr(drawn, expected) >= 60
    (plain,) = pictures(minisd.load(model), ["a cat"], [3], SETTINGS)
    assert psnr(drawn, plain) < 45
    status, _, err = command("sample.py", *flags, "--guess_mode")
    assert status == 2 and "--guess_mode is for ControlNets, and" in err
    if count == 2:
        with pytest.raises(ValueError, match="1.safetensors is a T2I-Adapter: give it as --controlnet"):
            minisd.load(model).attach(sources[1])
        with pytest.raises(ValueError, match="takes it by --controlnet"):
            minisd.load(sources[1])


def test_other_t2i_adapters_are_refused(model):
    config = minisd.load(model).unet.config
    whole = adapter_of(config, downscale=4).state_dict()
    first = "adapter.conv_in.weight"
    for message, tensors in (
        ("x: a T2I-Adapter for latents 8 times smaller than the image, and here they are 4",
         adapter_of(config).state_dict()),
        ("x: 1 missing .*conv_in.bias", {n: t for n, t in whole.items() if n != "adapter.conv_in.bias"}),
        ("x: 1 unknown .more", whole | {"more": torch.zeros(1)}),
        ("x: .* tensors of another shape",
         adapter_of(replace(config, block_out_channels=(32, 48, 48)), downscale=4).state_dict()),
        ("x: a T2I-Adapter without its first", whole | {first: torch.zeros(1)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            t2i_adapter.load(tensors, config, 4, "x")
