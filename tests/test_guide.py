"""The commands of the field's guide, verbatim but for the steps, the size and the data."""

import os
import shlex
import string
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

import train
from minisd.formats import config_json
from tests.helpers import TINY_PIXELS
from tests.method_helpers import make_pairs

PIPELINE = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
LORA = {"pytorch_lora_weights.safetensors"}

# By name: the command; what else replaces its size; what is left beside the log and the pictures.
COMMANDS = {
    "unconditional": (
        """--method unconditional --dataset_name="$DATA" --resolution=64 --output_dir="ddpm-ema-flowers-64"
        --train_batch_size=16 --num_epochs=100 --gradient_accumulation_steps=1 --learning_rate=1e-4
        --lr_warmup_steps=500 --mixed_precision=no --push_to_hub""",
        "--model_config_name_or_path=config.json --train_batch_size=2 --eval_batch_size=1 "
        "--ddpm_num_inference_steps=2",
        {"model_index.json", "scheduler", "unet"},
    ),
    "dreambooth": (
        """--method dreambooth --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA
        --output_dir=$OUT --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=1 --learning_rate=5e-6 --lr_scheduler="constant" --lr_warmup_steps=0
        --max_train_steps=400""",
        "",
        PIPELINE,
    ),
    "text_to_image": (
        """--method text_to_image --mixed_precision="fp16" --pretrained_model_name_or_path=$MODEL
        --dataset_name=$CAPTIONED --use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1
        --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05
        --max_grad_norm=1 --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="sd-pokemon-model" """,
        "",
        PIPELINE,
    ),
    "lora": (
        """--method lora --mixed_precision="fp16" --pretrained_model_name_or_path=$MODEL
        --dataset_name=$CAPTIONED --dataloader_num_workers=8 --resolution=512 --center_crop --random_flip
        --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=15000 --learning_rate=1e-04
        --max_grad_norm=1 --lr_scheduler="cosine" --lr_warmup_steps=0 --output_dir=${OUT} --push_to_hub
        --hub_model_id=${NAME} --report_to=wandb --checkpointing_steps=500
        --validation_prompt="A pokemon with blue eyes." --seed=1337""",
        "",
        LORA,
    ),
    "lora as DreamBooth": (
        """--method lora --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA --output_dir=$OUT
        --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1
        --gradient_accumulation_steps=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to="wandb"
        --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
        --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=50 --seed="0"
        --push_to_hub""",
        "",
        LORA,
    ),
    "custom_diffusion": (
        """--method custom_diffusion --pretrained_model_name_or_path=$MODEL --instance_data_dir=$DATA
        --output_dir=$OUT --class_data_dir=./real_reg/samples_cat/ --with_prior_preservation --real_prior
        --prior_loss_weight=1.0 --class_prompt="cat" --num_class_images=200
        --instance_prompt="photo of a <new1> cat" --resolution=512 --train_batch_size=2 --learning_rate=1e-5
        --lr_warmup_steps=0 --max_train_steps=250 --scale_lr --hflip --modifier_token "<new1>" """,
        "",
        {"pytorch_custom_diffusion_weights.safetensors", "<new1>.safetensors"},
    ),
    "controlnet": (
        """--method controlnet --pretrained_model_name_or_path=$MODEL --output_dir=$OUT --dataset_name=$PAIRS
        --resolution=512 --learning_rate=1e-5 --validation_image "$PAIRS/source0.png" "$PAIRS/source1.png"
        --validation_prompt "red circle with blue background" "cyan circle with brown floral background"
        --train_batch_size=4 --mixed_precision="fp16" --tracker_project_name="controlnet-demo"
        --report_to=wandb --gradient_checkpointing --set_grads_to_none --num_train_epochs=3""",
        "",
        {"config.json", "diffusion_pytorch_model.safetensors"},
    ),
    "instruct_pix2pix": (
        """--method instruct_pix2pix --pretrained_model_name_or_path=$MODEL --dataset_name=$PAIRS
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


def run(command: str, further: str, names: dict, monkeypatch) -> int:
    argv = shlex.split(string.Template(command).substitute(names)) + shlex.split(further)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    return train.main()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_guide_s_command(name, place, monkeypatch, capsys, tmp_path):
    command, size, left = COMMANDS[name]
    size = f"--resolution=32 --max_train_steps=2 {size}"
    size += "" if "unconditional" in command else " --num_validation_images=1"
    assert run(command, size, place, monkeypatch) == 0
    said = "".join(capsys.readouterr())
    assert ("fp16 needs a GPU: on this CPU the run is in fp32" in said) == ("fp16" in command)
    assert ("--push_to_hub: nothing will be uploaded:" in said) == ("--push_to_hub" in command)
    assert ("--report_to wandb: not installed" in said) == ("wandb" in command)
    out = next(p for p in (tmp_path / "out", tmp_path / "sd-pokemon-model", tmp_path / "ddpm-ema-flowers-64")
               if p.exists())  # fmt: skip
    found = {p.name for p in out.iterdir()} - {"log.jsonl", "options.json", "result.png", "validation"}
    assert found == left
    for path in out.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values())
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_dataset_of_the_hub_needs_its_package(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    names = place | {"DATA": "huggan/flowers-102-categories"}
    with pytest.raises(ValueError, match=r"--dataset_name huggan/.* needs the package `datasets`: pip inst"):
        run(*COMMANDS["unconditional"][:2], names, monkeypatch)
    assert not os.path.exists("ddpm-ema-flowers-64")
