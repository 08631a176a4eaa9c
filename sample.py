"""Generate images with a Stable Diffusion v1.x model.

    python sample.py --model M --prompt "a cat"
    python sample.py --model M --adapter text-inversion-model --prompt "a photo of a <cat>" --num_images 4
    python sample.py --like samples/00000-seed-0.png --steps 30
    python sample.py --model M --prompt "a cat" --csv sweep.csv
    python sample.py --model M --adapter lora.safetensors:0.8 --export merged.safetensors

M is a folder in the diffusers layout, a .safetensors or .ckpt file, or a hub id.
"""

from minisd import cli
from minisd.__main__ import sample as main

if __name__ == "__main__":
    cli.run("sample.py", main)
