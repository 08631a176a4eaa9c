"""Pictures in: what is begun with, edited, redrawn under a mask or steered equals diffusers' pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from minisd import cli, registry
from minisd.adapters import controlnet, lora
from minisd.data import images
from minisd.data.canny import canny
from minisd.formats.diffusers import save_part
from minisd.models.controlnet import ControlNet
from minisd.sampling.generate import Control, Settings, denoise, pictures
from minisd.sampling.input_images import InputImages
from minisd.sampling.stable_diffusion import StableDiffusion
from tests.conftest import save_pipeline
from tests.lora_helpers import new
from tests.method_helpers import shake
from tests.picture_helpers import photo, psnr

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "lcm": ("LCMScheduler", {}),
}
PROMPTS, SEEDS = ["a photo of a cat", "an oil painting"], [3, 4]
SETTINGS = Settings(width=40, height=32, steps=10, negative_prompt="ugly", guidance_scale=5.0)


def half(size=(40, 32)) -> Image.Image:
    """A mask: the right part is redrawn, but for a corner of grey that is too dark."""
    image = Image.new("L", size, "black")
    ImageDraw.Draw(image).rectangle((size[0] // 2 + 1, 0, size[0], size[1]), fill="white")
    ImageDraw.Draw(image).rectangle((size[0] - 8, 0, size[0], 8), fill=127)
    return image


def as_mask(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image) > 127).float()[None]


PHOTOS = [photo(0), photo(1)]
GIVEN = {"init_images": torch.stack([images.to_tensor(p) for p in PHOTOS])}
MASKS = {"masks": as_mask(half()).expand(2, -1, -1, -1)}


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Models by their number of channels."""
    found = {4: model}
    for channels in (8, 9):
        folder = tmp_path_factory.mktemp(f"channels{channels}")
        found[channels] = save_pipeline(folder, in_channels=channels)
    return found


@pytest.fixture(scope="module")
def nets(model, tmp_path_factory):
    """Two ControlNets that say something."""
    found = []
    for size in (0.1, 0.05):
        network = ControlNet.from_unet(StableDiffusion.load(model).unet, downscale=4)
        shake(network, size)
        found.append(tmp_path_factory.mktemp("control"))
        save_part(found[-1], network)
    return found


@pytest.fixture
def theirs(folders, monkeypatch):
    """theirs(pipeline's name, channels, LoRAs and scales, further parts) of diffusers, with the mean of the
    latents instead of a sample, which is what we take."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)

    def make(name: str, channels: int = 4, loras: tuple = (), **parts):
        parts = {"safety_checker": None, "requires_safety_checker": False} | parts
        pipe = getattr(diffusers, name).from_pretrained(folders[channels], **parts)
        config = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)
        for i, (folder, _) in enumerate(loras):
            pipe.load_lora_weights(folder, adapter_name=str(i))
        if loras:
            pipe.set_adapters([str(i) for i in range(len(loras))], [scale for _, scale in loras])

        def draw(settings: Settings, **given) -> list[Image.Image]:
            scheduler, further = SCHEDULERS[settings.scheduler]
            pipe.scheduler = getattr(diffusers, scheduler).from_config(config, clip_sample=False, **further)
            negative = [settings.negative_prompt] * 2
            common = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
            generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            return pipe(PROMPTS, negative_prompt=negative, generator=generators, **common, **given).images

        return draw

    return make


def diffusers_nets(nets: list):
    from diffusers import ControlNetModel

    found = [ControlNetModel.from_pretrained(folder) for folder in nets]
    return found[0] if len(found) == 1 else found


def ours(folder, settings: Settings, **given) -> list[Image.Image]:
    return list(pictures(StableDiffusion.load(folder), PROMPTS, SEEDS, settings, **given))


def assert_same(drawn: list, expected: list) -> None:
    assert len(drawn) == len(expected) == 2
    for a, b in zip(drawn, expected, strict=True):
        assert a.size == b.size and np.asarray(a).std() > 3
        assert psnr(a, b) >= 65  # some of these differ by 55 from what another picture would give
    assert psnr(drawn[0], drawn[1]) < 40


def hints(number: int) -> list[Image.Image]:
    return [photo(number + i).transpose(Image.Transpose.ROTATE_180) for i in (0, 1)]


def controls(nets, scales=(0.9, 0.6), **further) -> list[Control]:
    found = []
    for i, (folder, scale) in enumerate(zip(nets, scales, strict=False)):
        hint = torch.stack([images.to_tensor(h) for h in hints(i)]) / 2 + 0.5
        found.append(Control(network=controlnet.load(folder), hint=hint, scale=scale, **further))
    return found


@pytest.fixture(scope="module")
def plain(model) -> Image.Image:
    """The first picture when nothing else is given."""
    return ours(model, SETTINGS)[0]


@pytest.fixture(scope="module")
def steered(model, nets) -> Image.Image:
    """The first picture when both ControlNets steer it in every step."""
    return ours(model, SETTINGS, controls=controls(nets))[0]


# Equal to diffusers


@pytest.mark.parity
@pytest.mark.parametrize("strength", [0.3, 0.58, 0.8, 1.0])
def test_image_to_image(folders, theirs, strength, plain):
    settings = replace(SETTINGS, strength=strength)
    drawn = ours(folders[4], settings, **GIVEN)
    assert_same(drawn, theirs("StableDiffusionImg2ImgPipeline")(SETTINGS, image=PHOTOS, strength=strength))
    assert psnr(drawn[0], plain) < 60


@pytest.mark.parity
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(folders, theirs, channels, strength):
    drawn = ours(folders[channels], replace(SETTINGS, strength=strength), **GIVEN, **MASKS)
    expected = theirs("StableDiffusionInpaintPipeline", channels)(
        SETTINGS, image=PHOTOS, mask_image=half(), strength=strength, width=40, height=32
    )
    assert_same(drawn, expected)


@pytest.mark.parity
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "ddim"])
def test_pictures_and_masks_with_other_schedulers(folders, theirs, scheduler, masked):
    settings = replace(SETTINGS, scheduler=scheduler, steps=6)
    given = {"image": PHOTOS, "strength": 0.7}
    if masked:
        given |= {"mask_image": half(), "width": 40, "height": 32}
    expected = theirs(f"StableDiffusion{'Inpaint' if masked else 'Img2Img'}Pipeline")(settings, **given)
    drawn = ours(folders[4], replace(settings, strength=0.7), **GIVEN, **(MASKS if masked else {}))
    assert_same(drawn, expected)


@pytest.mark.parity
def test_edits(folders, theirs):
    settings = replace(SETTINGS, image_guidance_scale=1.8)
    expected = theirs("StableDiffusionInstructPix2PixPipeline", 8)(
        SETTINGS, image=PHOTOS, image_guidance_scale=1.8
    )
    assert_same(ours(folders[8], settings, **GIVEN), expected)


@pytest.mark.parity
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_controlnets(folders, theirs, nets, count, guess, plain):
    nets = nets[:count]
    shown = [hints(i) for i in range(count)]
    expected = theirs("StableDiffusionControlNetPipeline", controlnet=diffusers_nets(nets))(
        SETTINGS,
        image=[list(pair) for pair in zip(*shown, strict=True)] if count > 1 else shown[0],
        controlnet_conditioning_scale=[0.9, 0.6][:count] if count > 1 else 0.9,
        guess_mode=guess,
    )
    drawn = ours(folders[4], SETTINGS, controls=controls(nets, guess=guess))
    assert_same(drawn, expected)
    assert psnr(drawn[0], plain) < 45


@pytest.mark.parity
def test_guess_mode_without_guidance(folders, theirs, nets):
    settings = replace(SETTINGS, guidance_scale=1.0)
    expected = theirs("StableDiffusionControlNetPipeline", controlnet=diffusers_nets(nets[:1]))(
        settings, image=hints(0), controlnet_conditioning_scale=0.9, guess_mode=True
    )
    assert_same(ours(folders[4], settings, controls=controls(nets[:1], guess=True)), expected)


@pytest.mark.parity
@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.3, 1.0), (0.25, 0.75)])
def test_controlnets_from_start_to_end(folders, theirs, nets, start, end, steered):
    """The second one from half of it on, too."""
    shown = controls(nets)
    shown = [replace(shown[0], start=start, end=end), replace(shown[1], start=start / 2)]
    expected = theirs("StableDiffusionControlNetPipeline", controlnet=diffusers_nets(nets))(
        SETTINGS,
        image=[list(pair) for pair in zip(hints(0), hints(1), strict=True)],
        controlnet_conditioning_scale=[0.9, 0.6],
        control_guidance_start=[start, start / 2],
        control_guidance_end=[end, 1.0],
    )
    drawn = ours(folders[4], SETTINGS, controls=shown)
    assert_same(drawn, expected)
    assert psnr(drawn[0], steered) < 50


@pytest.mark.parity
@pytest.mark.parametrize("guess", [False, True])
def test_a_controlnet_and_a_picture(folders, theirs, nets, guess):
    settings = replace(SETTINGS, strength=0.7)
    expected = theirs("StableDiffusionControlNetImg2ImgPipeline", controlnet=diffusers_nets(nets[:1]))(
        SETTINGS, image=PHOTOS, control_image=hints(0), strength=0.7, width=40, height=32,
        controlnet_conditioning_scale=0.9, guess_mode=guess, control_guidance_end=0.8,
    )  # fmt: skip
    drawn = ours(folders[4], settings, controls=controls(nets[:1], guess=guess, end=0.8), **GIVEN)
    assert_same(drawn, expected)


@pytest.mark.parity
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_a_controlnet_and_a_mask(folders, theirs, nets, channels, strength):
    """The ControlNet sees the noisy latents alone, whatever the UNet sees."""
    pipe = theirs("StableDiffusionControlNetInpaintPipeline", channels, controlnet=diffusers_nets(nets[:1]))
    expected = pipe(
        SETTINGS, image=PHOTOS, mask_image=half(), control_image=hints(0), strength=strength,
        width=40, height=32, controlnet_conditioning_scale=0.9,
    )  # fmt: skip
    settings = replace(SETTINGS, strength=strength)
    assert_same(ours(folders[channels], settings, controls=controls(nets[:1]), **GIVEN, **MASKS), expected)


# Ours


@pytest.mark.parametrize("channels", [4, 8, 9])
def test_a_picture_does_not_depend_on_its_batch(folders, nets, channels):
    """Everything at once, ControlNets with an edit and a mask too; and the same again."""
    sd = StableDiffusion.load(folders[channels])
    settings = replace(SETTINGS, steps=5, strength=0.8)
    given = {**GIVEN, **MASKS, "controls": controls(nets, guess=True)}
    together = list(pictures(sd, PROMPTS, SEEDS, settings, **given))
    singly = list(pictures(sd, PROMPTS, SEEDS, settings, **given, batch_size=1))
    assert all(psnr(a, b) >= 65 for a, b in zip(together, singly, strict=True))
    again = list(pictures(sd, PROMPTS, SEEDS, settings, **given))
    assert [i.tobytes() for i in again] == [i.tobytes() for i in together]


@pytest.mark.parametrize("scheduler", registry.names("schedulers"))
def test_every_scheduler_begins_with_a_picture(model, nets, scheduler):
    """It takes the steps that are left, and a ControlNet acts in its part of those."""
    sd, acting = StableDiffusion.load(model), set()
    steered = controls(nets[:1], start=0.5)
    settings = replace(SETTINGS, strength=0.85, scheduler=scheduler)
    assert settings.first_step == 2
    heard, count = steered[0].network.forward, 0
    steered[0].network.forward = lambda *args: acting.add(count) or heard(*args)
    for _ in denoise(sd, PROMPTS, SEEDS, settings, **GIVEN, controls=steered):
        count += 1
    assert count == 8 and acting == {4, 5, 6, 7}


@pytest.mark.parametrize("channels", [4, 8])
def test_what_is_outside_the_mask_stays(folders, channels):
    sd = StableDiffusion.load(folders[channels])
    *_, x = denoise(sd, PROMPTS, SEEDS, replace(SETTINGS, steps=4), **GIVEN, **MASKS)
    latents = sd.encode_images(GIVEN["init_images"])[0]
    assert torch.equal(x[..., :5], latents[..., :5])
    assert (x[..., 6:] - latents[..., 6:]).abs().mean() > 0.1


@pytest.mark.parametrize("channels, given, message", [
    (8, {}, "takes 8 channels: it needs a picture .--image"),
    (9, {}, "takes 9 channels: it needs a picture .--image"),
    (9, GIVEN, "takes 9 channels: it needs a mask .*--mask"),
])  # fmt: skip
def test_what_a_model_needs(folders, channels, given, message):
    with pytest.raises(ValueError, match=message):
        ours(folders[channels], SETTINGS, **given)


# The command


@pytest.fixture
def files(tmp_path):
    """Pictures of other sizes than the one that is drawn."""
    for i in (0, 1):
        photo(i, (45, 37)).save(tmp_path / f"photo{i}.png")
        photo(i, (64, 48)).transpose(Image.Transpose.ROTATE_180).save(tmp_path / f"hint{i}.png")
    half((80, 64)).save(tmp_path / "mask.png")
    return tmp_path


def options(model, *flags):
    return cli.parse_sample(["--model", str(model), "--prompt", "x", *map(str, flags)])[0].options


@pytest.mark.parity
def test_the_command(folders, files, nets, theirs, command):
    """Sizes are brought together and said; a mask, two ControlNets, one of them by edges, and two LoRAs."""
    photos, out = [files / f"photo{i}.png" for i in (0, 1)], files / "out"
    loras = [(files / "lora0", 0.7), (files / "lora1", 0.4)]
    for i, (folder, _) in enumerate(loras):
        lora.save(folder / "pytorch_lora_weights.safetensors", new(folders[4], ["attention"], seed=i)[1])
    status, stdout, stderr = command(
        "sample.py", "--model", folders[4], "--prompt", *PROMPTS, "--seed", SEEDS[0], "--steps", 10,
        "--guidance_scale", 5, "--negative_prompt", "ugly", "--output", out, "--image", *photos,
        "--mask", files / "mask.png", "--strength", 0.7, "--adapter", *(f"{path}:{s}" for path, s in loras),
        "--controlnet", f"{nets[0]}:0.9", "--control_image", files / "hint0.png",
        "--controlnet", nets[1], "--control_image", files / "hint1.png",
        "--control_preprocess", "canny", "none", "--control_end", 0.8,
    )  # fmt: skip
    assert status == 0, stderr
    assert "14/14" in stderr  # 2 pictures of 7 steps
    for name, size in (("photo0", "45x37"), ("photo1", "45x37"), ("mask", "80x64"), ("hint1", "64x48")):
        assert f"{name}.png: {size}, resized to 40x32" in stderr
    drawn = [Image.open(path) for path in sorted(out.glob("*seed*"))]
    shown = [Image.open(files / f"hint{i}.png").resize((40, 32), Image.Resampling.LANCZOS) for i in (0, 1)]
    pipe = theirs("StableDiffusionControlNetInpaintPipeline", loras=loras, controlnet=diffusers_nets(nets))
    expected = pipe(
        SETTINGS, image=[Image.open(p) for p in photos], mask_image=Image.open(files / "mask.png"),
        control_image=[canny(shown[0]), shown[1]], strength=0.7, width=40, height=32,
        controlnet_conditioning_scale=[0.9, 1.0], control_guidance_end=0.8,
    )  # fmt: skip
    assert_same(drawn, expected)


def test_one_for_all_or_one_for_each(model, files, nets):
    sd = StableDiffusion.load(model)
    photos = [files / f"photo{i}.png" for i in (0, 1)]
    tensors = [
        images.to_tensor(images.open_image(p).resize((40, 32), Image.Resampling.LANCZOS)) for p in photos
    ]

    def read(*flags, prompts=PROMPTS, count=4):
        settings = options(model, *flags)
        inputs = InputImages(settings)
        inputs.complete(settings, sd)
        return inputs.prompts(prompts), settings, inputs.tensors(sd, settings, count)

    prompts, settings, found = read("--image", *photos)
    assert (settings.width, settings.height, settings.strength) == (40, 32, 0.8)
    assert torch.equal(found["init_images"], torch.stack([tensors[i] for i in (0, 0, 1, 1)]))
    assert prompts == PROMPTS and found["masks"] is None and not found["controls"]
    assert torch.equal(read("--image", photos[1])[2]["init_images"], tensors[1].expand(4, -1, -1, -1))
    folder = files / "folder"
    folder.mkdir()
    for path in photos:
        path.rename(folder / path.name)
    prompts, settings, found = read("--image", folder, "--mask", files / "mask.png", prompts=["x"], count=2)
    assert prompts == ["x", "x"] and torch.equal(found["init_images"], torch.stack(tensors))
    assert settings.first_step == 0 and set(found["masks"].unique().tolist()) == {0.0, 1.0}
    mask = as_mask(half((80, 64)).resize((40, 32), Image.Resampling.LANCZOS))
    assert torch.equal(found["masks"], mask.expand(2, -1, -1, -1))

    _, settings, found = read("--controlnet", nets[0], "--control_image", files / "hint0.png", "--height", 40)
    assert (settings.width, settings.height, settings.first_step) == (64, 40, 0)
    assert found["controls"][0].hint.shape == (4, 3, 40, 64) and found["controls"][0].hint.min() >= 0


def test_masks_may_be_transparent(model, files):
    """What is drawn in white is redrawn, whatever is behind it."""
    mask = Image.new("RGBA", (40, 32), (255, 255, 255, 0))
    ImageDraw.Draw(mask).rectangle((0, 0, 19, 31), fill=(255, 255, 255, 255))
    mask.save(files / "strokes.png")
    settings = options(model, "--image", files / "photo0.png", "--mask", files / "strokes.png")
    sd, inputs = StableDiffusion.load(model), InputImages(settings)
    inputs.complete(settings, sd)
    found = inputs.tensors(sd, settings, 1)["masks"]
    assert found[..., :20].all() and not found[..., 20:].any()


@pytest.mark.parametrize("flags, message", [
    ("--strength 0.5", "--strength needs --image"),
    ("--mask a.png", "--mask needs --image"),
    ("--image_guidance_scale 2", "--image_guidance_scale needs --image"),
    ("--image a.png --image_guidance_scale 2 --guidance_scale 1", "--image_guidance_scale has no effect"),
    ("--image a.png --strength 0", "--strength must be above 0"),
    ("--image a.png --strength 1.1", "--strength must be above 0, and at most 1"),
    ("--image a.png --strength 0.04 --steps 20", "--strength 0.04 leaves none of the 20 steps"),
    ("--controlnet a", "1 --controlnet and 0 --control_image"),
    ("--control_image a.png", "0 --controlnet and 1 --control_image"),
    ("--controlnet a b --control_image a.png", "2 --controlnet and 1 --control_image"),
    ("--control_start 0.1", "--control_start needs --controlnet"),
    ("--control_preprocess canny", "--control_preprocess needs --controlnet"),
    ("--guess_mode", "--guess_mode needs --controlnet"),
    ("--controlnet a --control_image b --control_end 0.5 0.6", "2 --control_end and 1 --controlnet"),
    ("--controlnet a --control_image b --control_start 0.5 --control_end 0.5", "0.5 must be below"),
    ("--controlnet a --control_image b --control_end 1.5", "--control_end 1.5"),
    ("--controlnet a --control_image b --control_preprocess cany", "cany"),
    ("--width 36", "--width must be a positive multiple of 8"),
])  # fmt: skip
def test_mistakes(model, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        options(model, *flags.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_mistakes_in_files(model, files, nets):
    sd, picture = StableDiffusion.load(model), files / "photo0.png"
    Image.new("L", (40, 32), 100).save(files / "grey.png")
    Image.new("RGB", (7, 32)).save(files / "thin.png")
    (files / "empty").mkdir()

    def refused(message, *flags, prompts=PROMPTS):
        with pytest.raises(ValueError, match=message):
            settings = options(model, *flags)
            inputs = InputImages(settings)
            inputs.prompts(prompts)
            inputs.complete(settings, sd)
            inputs.tensors(sd, settings, 2)

    steered = ("--controlnet", nets[0], "--control_image")
    refused("nowhere.png", "--image", files / "nowhere.png")
    refused("nowhere.png", *steered, files / "nowhere.png")
    refused("empty holds no pictures", "--image", files / "empty")
    few = "photo0.png has more than 9 pixels; --max_pixels raises"
    refused(few, "--image", picture, "--max_pixels", 9)
    refused(few, *steered, picture, "--max_pixels", 9)
    refused("mask.png has more", "--image", picture, "--mask", files / "mask.png", "--max_pixels", 45 * 37)
    refused("2 --image for 3 pictures", "--image", picture, picture, prompts=["a", "b", "c"])
    refused("3 --mask for 2 pictures", "--image", picture, "--mask", *[files / "mask.png"] * 3)
    refused("grey.png: nothing in it is white", "--image", picture, "--mask", files / "grey.png")
    refused("thin.png has a side of less than 8", "--image", files / "thin.png")
    refused("has no effect: model.* no instruct-pix2pix", "--image", picture, "--image_guidance_scale", 2)
    refused("--control_start 0.505 to --control_end 0.515 has none of the 50 steps", *steered, picture,
            "--control_start", 0.505, "--control_end", 0.515)  # fmt: skip
    other = ControlNet(replace(controlnet.load(nets[0]).config, layers_per_block=2))
    save_part(files / "other", other)
    refused("other: a ControlNet with layers_per_block 2", "--controlnet", files / "other",
            "--control_image", picture)  # fmt: skip


def test_a_control_net_is_read_once(model, nets):
    sd = StableDiffusion.load(model)
    assert sd.controlnet(str(nets[0])) is sd.controlnet(str(nets[0]))
    assert sd.controlnet(str(nets[0])) is not sd.controlnet(str(nets[1]))
