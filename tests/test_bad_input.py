"""What is wrong with data or flags is one line that says where, with status 2, and nothing is left."""

import json
import re

import pytest
from PIL import Image

PRIOR = ["--with_prior_preservation", "--real_prior", "--class_prompt", "cat", "--class_data_dir", "data"]
CASES = {
    "a row without its file": (
        ["text_to_image"],
        {"metadata.csv": "file_name,text\n0.png,a\n1.png,b\n2.png,c\n"},
        r"--data: data/metadata.csv, line 4: there is no data/2.png",
    ),
    "a file without its row": (
        ["text_to_image"],
        {"metadata.csv": "file_name,text\n0.png,a\n"},
        r"--data: data/1.png has no row in data/metadata.csv",
    ),
    "a broken row": (
        ["text_to_image"],
        {"metadata.csv": "file_name,text\n0.png,a\n1.png,b, c\n"},
        r"--data: data/metadata.csv, line 3: 3 cells under 2 columns \(file_name, text\)",
    ),
    "an unknown caption column": (
        ["text_to_image", "--caption_column", "words"],
        {"metadata.csv": "file_name,text,feature\n0.png,a,b\n1.png,b,c\n"},
        r"--caption_column words: data has no such column, but image, text, feature",
    ),
    "an unequal pair": (
        ["controlnet"],
        {"prompt.json": json.dumps({"source": "0.png", "target": "1.png", "prompt": "x"})},
        r"--conditioning_image_column: an unequal pair in data: data/1.png is 40x32, data/0.png is 32x32",
    ),
    "half a pair": (
        ["instruct_pix2pix"],
        {"metadata.csv": "file_name,edit_prompt\n0.png,x\n1.png,y\n"},
        r"--original_image_column input_image: data has no such column, but image, edit_prompt",
    ),
    "too few real pictures of the class": (
        ["custom_diffusion", "--instance_prompt", "x", "--num_class_images", "3", *PRIOR],
        {},
        r"--class_data_dir: data has 2 images, --real_prior needs --num_class_images 3",
    ),
    "a class that is not named": (
        ["custom_diffusion", "--concepts_list", "data/c.json", *PRIOR[:2]],
        {"c.json": '[{"instance_prompt": "x", "instance_data_dir": "data"}]'},
        r"--concepts_list: data/c.json, concept 1: --with_prior_preservation needs class_prompt",
    ),
    "a target that means no layer": (
        ["lora", "--target", "attn9", "--instance_prompt", "x"],
        {},
        r"--target 'attn9' means no layer; it is one of attention, feed_forward",
    ),
    "all pictures held out": (
        ["text_to_image", "--validation_split", "2"],
        {"metadata.csv": "file_name,text\n0.png,a\n1.png,b\n"},
        r"--validation_split 2 leaves none of 2 examples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line(name, model, tmp_path, monkeypatch, command):
    flags, files, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for i, size in enumerate([(32, 32), (40, 32)]):
        Image.new("RGB", size).save(tmp_path / "data" / f"{i}.png")
    for file, text in files.items():
        (tmp_path / "data" / file).write_text(text)
    data = [] if "--concepts_list" in flags else ["--data", "data"]
    common = ["--model", model, "--resolution", 32, "--output_dir", "out", *data]
    status, _, stderr = command("train.py", "--method", *flags, *common)
    lines = stderr.strip().splitlines()
    assert status == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
    assert re.match(f"train.py: error: {message}", lines[0]), lines[0]
