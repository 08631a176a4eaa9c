"""The commands of the field's guide, verbatim but for the steps, the size and the data."""

import json
import os
import shlex
import string
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

import train
from minisd import cli, registry
from minisd.formats import config_json
from tests.conftest import ROOT
from tests.helpers import TINY_PIXELS
from tests.method_helpers import make_pairs, new
from tests.test_methods import NEEDS

PIPELINE = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
LORA = {"pytorch_lora_weights.safetensors"}

# By name: the command; what else replaces its size; what is left beside the log and the pictures.
COMMANDS = {
    "textual_inversion": (
        """accelerate launch train.py --method textual_inversion
        --pretrained_model_name_or_path=$MODEL --train_data_dir=$DATA --learnable_property="object"
        --placeholder_token="<cat-toy>" --initializer_token="toy" --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
        --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="textual_inversion_cat" """,
        "",
        {"learned_embeds.safetensors"},
    ),
    "unconditional": (
        """accelerate launch train.py --method unconditional
        --dataset_name="$DATA" --resolution=64 --output_dir="ddpm-ema-flowers-64"
        --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 --learning_rate=1e-4
        --lr_warmup_steps=500 --mixed_precision=no --push_to_hub""",
        "--model_config_name_or_path=config.json --train_batch_size=2 --eval_batch_size=1 "
        "--ddpm_num_inference_steps=2",
        {"model_index.json", "scheduler", "unet"},
    ),
    "dreambooth": (
        """accelerate launch train.py --method dreambooth
        --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA
        --output_dir=$OUT --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=1 --learning_rate=5e-6 --lr_scheduler="constant" --lr_warmup_steps=0
        --max_train_steps=400""",
        "",
        PIPELINE,
    ),
    "text_to_image": (
        """accelerate launch --mixed_precision="fp16" train.py --method text_to_image
        --pretrained_model_name_or_path=$MODEL
        --dataset_name=$CAPTIONED --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1
        --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05
        --max_grad_norm=1 --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="sd-pokemon-model" """,
        "",
        PIPELINE,
    ),
    "lora": (
        """accelerate launch --mixed_precision="fp16" train.py --method lora
        --pretrained_model_name_or_path=$MODEL
        --dataset_name=$CAPTIONED --dataloader_num_workers=8 --resolution=512 --center_crop --random_flip
        --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=15000 --learning_rate=1e-04
        --max_grad_norm=1 --lr_scheduler="cosine" --lr_warmup_steps=0 --output_dir=${OUT} --push_to_hub
        --hub_model_id=${NAME} --report_to=wandb --checkpointing_steps=500
        --validation_prompt="A pokemon with blue eyes." --seed=1337""",
        "",
        LORA,
    ),
    "lora as DreamBooth": (
        """accelerate launch train.py --method lora
        --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA --output_dir=$OUT
        --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to="wandb"
        --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
        --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=50 --seed="0"
        --push_to_hub""",
        "",
        LORA,
    ),
    "custom_diffusion": (
        """accelerate launch train.py --method custom_diffusion
        --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA
        --output_dir=$OUT --class_data_dir=./real_reg/samples_cat/ --with_prior_preservation --real_prior
        --prior_loss_weight=1.0 --class_prompt="cat" --num_class_images=200
        --instance_prompt="photo of a <new1> cat" --resolution=512 --train_batch_size=2 --learning_rate=1e-5
        --lr_warmup_steps=0 --max_train_steps=250 --scale_lr --hflip --modifier_token "<new1>" """,
        "",
        {"pytorch_custom_diffusion_weights.safetensors", "<new1>.safetensors"},
    ),
    "controlnet": (
        """accelerate launch --mixed_precision="fp16" train.py --method controlnet
        --pretrained_model_name_or_path=$MODEL --output_dir=$OUT --dataset_name=$PAIRS
        --resolution=512 --learning_rate=1e-5 --validation_image "$PAIRS/source0.png" "$PAIRS/source1.png"
        --validation_prompt "red circle with blue background" "cyan circle with brown floral background"
        --train_batch_size=4 --mixed_precision="fp16" --tracker_project_name="controlnet-demo"
        --report_to=wandb --gradient_checkpointing --set_grads_to_none --num_train_epochs=3""",
        "",
        {"config.json", "diffusion_pytorch_model.safetensors"},
    ),
    "instruct_pix2pix": (
        """accelerate launch --mixed_precision="fp16" train.py --method instruct_pix2pix
        --pretrained_model_name_or_path=$MODEL --dataset_name=$PAIRS
        --enable_xformers_memory_efficient_attention --resolution=256 --random_flip --train_batch_size=4
        --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000
        --checkpointing_steps=5000 --checkpoints_total_limit=1 --learning_rate=5e-05 --max_grad_norm=1
        --lr_warmup_steps=0 --conditioning_dropout_prob=0.05 --mixed_precision=fp16 --seed=42
        --output_dir=$OUT --val_image_url="$PAIRS/source0.png" --validation_prompt="make the mountains snowy"
        --report_to=wandb --push_to_hub""",
        "",
        PIPELINE,
    ),
}


@pytest.fixture
def place(model, cat, captioned, tmp_path, monkeypatch):
    """A folder to be in, with what the commands name."""
    monkeypatch.chdir(tmp_path)
    for tracker in ("wandb", "torch.utils.tensorboard"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, tracker, None)
    config_json.write(tmp_path, "unet2d", TINY_PIXELS)
    names = {"MODEL": model, "DATA": cat, "CAPTIONED": captioned, "OUT": "out", "NAME": "pokemon-lora"}
    names["PAIRS"] = make_pairs(tmp_path / "pairs")
    retrieved = tmp_path / "real_reg" / "samples_cat"
    (retrieved / "images").mkdir(parents=True)
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(retrieved / "images" / f"{i}.png")
    paths = [f"./real_reg/samples_cat/images/{i}.png\n" for i in range(200)]
    (retrieved / "images.txt").write_text("".join(paths))
    (retrieved / "caption.txt").write_text("a real cat\n" * 200)
    return names


def words_of(command: str, further: str, names: dict) -> list[str]:
    """The command's words, without its launcher's name."""
    words = shlex.split(string.Template(command).substitute(names)) + shlex.split(further)
    assert words[:2] == ["accelerate", "launch"]
    return words[2:]


def launched(words: list[str], monkeypatch) -> int:
    """Run what `accelerate launch` would start, in this process, with the variables that it would set."""
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]
    argv, env = prepare_simple_launcher_cmd_env(args)
    for name, value in env.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", argv[1:])
    return train.main()


def accelerate(*words: str, cwd) -> subprocess.CompletedProcess:
    """Run `accelerate launch` with these words, in a process of its own."""
    pytest.importorskip("accelerate")
    script = words.index("train.py")
    words = [*words[:script], str(ROOT / "train.py"), *words[script + 1 :]]
    module = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HOME": str(cwd / "home")}
    return subprocess.run([*module, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def trained(folder) -> dict:
    return {p.name: load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys() and one
    return all(t.equal(other[file][n]) for file, tensors in one.items() for n, t in tensors.items())


def short(name: str) -> str:
    """What makes a command of the guide short."""
    common = "" if name == "unconditional" else " --num_validation_images=1"
    return f"--resolution=32 --max_train_steps=2 {COMMANDS[name][1]}{common}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_guide_s_command(name, place, monkeypatch, capsys, tmp_path):
    command, _, left = COMMANDS[name]
    assert launched(words_of(command, short(name), place), monkeypatch) == 0
    said = "".join(capsys.readouterr())
    assert ("fp16 needs a GPU: on this CPU the run is in fp32" in said) == ("fp16" in command)
    assert ("--push_to_hub: nothing will be uploaded:" in said) == ("--push_to_hub" in command)
    assert ("--report_to wandb: not installed" in said) == ("wandb" in command)
    out = next(p.parent for p in tmp_path.glob("*/options.json"))
    recorded = json.loads((out / "options.json").read_text())["mixed_precision"]
    assert recorded == ("fp16" if "fp16" in command else "no")
    found = {p.name for p in out.iterdir()} - {"log.jsonl", "options.json", "result.png", "validation"}
    assert found == {"README.md", "report.html", "run.json"} | left
    for path in out.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_dataset_of_the_hub_needs_its_package(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    names = place | {"DATA": "huggan/flowers-102-categories"}
    with pytest.raises(ValueError, match=r"--dataset_name huggan/.* needs the package `datasets`: pip inst"):
        launched(words_of(*COMMANDS["unconditional"][:2], names), monkeypatch)
    assert not os.path.exists("ddpm-ema-flowers-64")


# The launcher's precision

LORA_COMMAND = "train.py --method lora --pretrained_model_name_or_path=$MODEL --train_data_dir=$CAPTIONED"
LORA_COMMAND += " --resolution=32 --max_train_steps=2 --train_batch_size=2 --num_validation_images=1"


def lora(place, *, launcher: str = "", flags: str = "", out: str) -> list[str]:
    command = f"accelerate launch {launcher} {LORA_COMMAND} --report_to=none --output_dir={out} {flags}"
    return words_of(command, "", place)


def test_the_launcher_s_precision_is_the_flag_s(place, monkeypatch, tmp_path, script):
    """By the real launcher, beside plain python with the flag; and an explicit flag wins."""
    done = accelerate(*lora(place, launcher="--mixed_precision=bf16", out="launched"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = lora(place, flags="--mixed_precision=bf16", out=str(tmp_path / "plain"))
    assert script(*words)[0] == 0
    assert launched(lora(place, out="full"), monkeypatch) == 0
    flag = lora(place, launcher="--mixed_precision=bf16", flags="--mixed_precision=no", out="explicit")
    assert launched(flag, monkeypatch) == 0
    results = {name: trained(tmp_path / name) for name in ("launched", "plain", "full", "explicit")}
    assert same(results["launched"], results["plain"]) and same(results["full"], results["explicit"])
    assert not same(results["launched"], results["full"])


@pytest.mark.slow
def test_accelerate_s_config_file(place, monkeypatch, tmp_path, capsys):
    """Its precision counts as the launcher's flag; a run with another is not resumed."""
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 1\nuse_cpu: true\ndynamo_backend: 'no'\n"
    )
    file = "--config_file config.yaml"
    flags = "--checkpointing_steps=1"
    done = accelerate(*lora(place, launcher=file, flags=flags, out="out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "options.json").read_text())["mixed_precision"] == "bf16"
    more = "--max_train_steps=3 --resume_from_checkpoint=latest"
    with pytest.raises(ValueError, match="--mixed_precision was bf16"):
        launched(lora(place, flags=more, out="out"), monkeypatch)
    assert launched(lora(place, launcher=file, flags=more, out="out"), monkeypatch) == 0


OWN_PRECISION = {"unconditional", "textual_inversion"}  # whose scripts have "no" as the flag's default


@pytest.mark.parametrize("method", registry.names("methods"))
def test_the_precision_of_each_method(method, model, cat, place, monkeypatch, capsys):
    """By the launcher where diffusers' script leaves it to that, otherwise said not to be used."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    more = {"custom_diffusion": ["--instance_prompt", "x"], "dreambooth": ["--instance_prompt", "x"]}
    more |= {name: NEEDS[name] for name in ("erase", "reward", "sliders")}
    own = [] if method == "unconditional" else ["--model", str(model)]
    own += ["--data", str(cat)] if "data" in cli.options_of(method).__dataclass_fields__ else []
    o = cli.parse_train(["--method", method, *own, *more.get(method, [])])[1]
    said = "accelerate launch --mixed_precision bf16: not used" in capsys.readouterr().out
    expected = "no" if method in OWN_PRECISION else "bf16"
    assert (o.mixed_precision, said) == (expected, method in OWN_PRECISION)
    assert str(new(method, o).dtype) == {"no": "torch.float32", "bf16": "torch.bfloat16"}[expected]


@pytest.mark.parametrize(
    "env, message",
    [
        ({"MIXED_PRECISION": "fp8"}, "accelerate launch --mixed_precision fp8: minisd has no, fp16 or bf16"),
        ({"USE_DEEPSPEED": "true"}, "accelerate launch asks for DeepSpeed, which minisd does not have"),
        (
            {"USE_FSDP": "true"},
            "accelerate launch asks for FSDP by a config (use --shard fsdp), which minisd does not have",
        ),
        (
            {"GRADIENT_ACCUMULATION_STEPS": "3"},
            "--gradient_accumulation_steps is not accelerate's 3",
        ),
    ],
)
def test_what_the_launcher_may_not_ask_for(env, message, place, monkeypatch, command):
    for name, value in env.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    words = lora(place, flags="--gradient_accumulation_steps=2", out="out")
    assert command(*words) == (2, "", f"train.py --method lora: error: {message}\n")
    assert not os.path.exists("out")


def test_what_else_the_launcher_sets(place, monkeypatch, capsys, command):
    for name, value in {"DYNAMO_BACKEND": "INDUCTOR", "GRADIENT_ACCUMULATION_STEPS": "2"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    status, out, _ = command(*lora(place, out="out"))
    assert status == 0 and "accelerate launch --dynamo_backend: not used" in out
    assert "2 updates of 4 images" in out
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert "started by MPI" in command(*lora(place, out="other"))[2]


def test_the_launcher_s_cpu(monkeypatch):
    """Counts where there is a GPU."""
    import torch

    from minisd.training import distributed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert distributed.device().type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert distributed.device().type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["", "--multi_gpu --num_processes=2"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_guide_s_command_by_the_launcher_itself(name, launcher, place, tmp_path):
    words = words_of(COMMANDS[name][0], short(name), place)
    done = accelerate(*launcher.split(), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = next(p.parent for p in tmp_path.glob("*/options.json"))
    assert all(t.isfinite().all() for tensors in trained(out).values() for t in tensors.values())
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
