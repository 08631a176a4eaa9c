"""Train a Stable Diffusion v1.x model by one of several methods.

    python train.py --help                                              the methods
    python train.py --method textual_inversion --help                   the flags of one
    python train.py --method textual_inversion --model M --data ./cat   learn the concept in ./cat

M is a folder in the diffusers layout, a .safetensors or .ckpt file, or a hub id.
"""

from minisd import cli
from minisd.__main__ import train as main

if __name__ == "__main__":
    cli.run("train.py", main)
