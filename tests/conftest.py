"""A tiny Stable Diffusion with random weights and CLIP's vocabulary, written by diffusers, and pictures."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # fp32 on every CPU, unless a test asks for bf16
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small to share out

PAIRED = "controlnet", "dpo", "instruct_pix2pix"  # whose data are pairs of images
ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "minisd" / "tokenizer"

# What SD v1.x ships as scheduler_config.json.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def make_pipeline(in_channels: int = 4, **scheduler):
    """A diffusers pipeline of 32x32 pictures: the latents are 8x8, as far from square as one asks."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    with torch.no_grad():  # no zero biases, no unit norms: every tensor matters
        for part in (unet, vae, text_encoder):
            for p in part.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(TOKENIZER)),
        scheduler=PNDMScheduler(**SCHEDULER | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path, **changes) -> Path:
    """Write the pipeline of make_pipeline(**changes), and return its folder.

    Its tokenizer is that of minisd, in vocab.json and merges.txt as SD v1.x ships it: transformers takes four
    times as long to read its own tokenizer.json, which test_generate.py and test_weights.py do.
    """
    make_pipeline(**changes).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").symlink_to(TOKENIZER, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Folder of the tiny model."""
    pytest.importorskip("diffusers")
    return save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(model):
    """diffusers' pipeline of the same model, with DDIM."""
    from tests.method_helpers import pipeline

    return pipeline(model)


@pytest.fixture
def sd(model):
    """Our model of the same files, without adapters."""
    from tests.lora_helpers import fresh

    return fresh(model)


@pytest.fixture(scope="session")
def cat(tmp_path_factory) -> Path:
    """A folder named cat with five small pictures of different sizes."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("data") / "cat"
    folder.mkdir()
    for i in range(5):
        image = Image.new("RGB", (48, 40 + 4 * i), (40 * i, 255 - 40 * i, 128))
        ImageDraw.Draw(image).ellipse((8 + i, 8, 40, 36), fill=(255, 40 * i, 0))
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def captioned(cat) -> Path:
    """The same pictures, with captions beside them."""
    folder = cat.parent / "captioned"
    folder.mkdir()
    for i, path in enumerate(sorted(cat.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{i}.txt").write_text(f"a drawing of cat number {i}")
    return folder


@pytest.fixture
def short_run(model, cat, captioned, tmp_path, monkeypatch):
    """short_run("lora", "--rank", 2, seed=1): the options of a short run of a method on the tiny models. Its
    images take two steps of sampling, since nobody looks at them."""
    from minisd import cli
    from minisd.formats import config_json
    from minisd.methods._base import Method
    from minisd.methods._prior import Subject
    from minisd.options import Captions
    from tests import method_helpers
    from tests.helpers import TINY_PIXELS

    monkeypatch.setattr(Method, "preview_steps", 2)

    def make(method: str, *flags, **changes):
        kind = cli.options_of(method)
        captions = issubclass(kind, Captions) and not issubclass(kind, Subject)
        data = captioned if captions else cat
        if method in PAIRED:
            data = method_helpers.make_pairs(tmp_path / "pairs")
        common = ["--data", data] if "data" in kind.__dataclass_fields__ else []
        common += ["--rejected_image_column", "source"] if method == "dpo" else []
        common += ["--output_dir", tmp_path / "out", "--resolution", 32]
        if method == "unconditional":
            config_json.write(tmp_path, "unet2d", TINY_PIXELS)
            common += ["--model_config_name_or_path", tmp_path / "config.json"]
        else:
            common += ["--model", model, "--num_validation_images", 1]
        return method_helpers.options(method, *common, *flags, **changes)

    return make


@pytest.fixture
def in_foreground():
    """SIGINT is heard, as it is not in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder with a.png and b.png."""
    from tests.data_helpers import picture

    for name in "ab":
        picture(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture(scope="session")
def script():
    """script("train.py", *flags): run it from the repository root; returns (exit status, stdout, stderr)."""

    def run(name: str, *flags, **env) -> tuple[int, str, str]:
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train.py", *flags): as `script`, but in this process, which saves the seconds of a start."""
    from minisd import cli

    def run(name: str, *flags) -> tuple[int, str, str]:
        main = importlib.import_module(name.removesuffix(".py")).main
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(name, main)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def sd_parts():
    """A Stable Diffusion of toy size with random weights."""
    from tests.weights_helpers import tiny

    return tiny()


@pytest.fixture(scope="session")
def sd_folder(sd_parts, tmp_path_factory) -> Path:
    """Its folder in the layout of diffusers."""
    from minisd.formats import diffusers

    path = tmp_path_factory.mktemp("weights") / "model"
    diffusers.save(path, sd_parts)
    return path


@pytest.fixture(scope="session")
def sd_file(sd_parts, tmp_path_factory) -> Path:
    """Its single file."""
    from minisd.formats import single_file

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    single_file.save(path, sd_parts)
    return path
