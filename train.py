"""Train a Stable Diffusion v1.x model by one of several methods.

    python train.py --help                                              the methods
    python train.py --method textual_inversion --help                   the flags of one
    python train.py --method textual_inversion --model M --data ./cat   learn the concept in ./cat

M is a folder in the diffusers layout, a .safetensors or .ckpt file, or a hub id.
"""

import sys

from minisd import cli


def main() -> int:
    name, options = cli.parse_train(sys.argv[1:])

    from minisd import device, registry
    from minisd.training import distributed, loop
    from minisd.training.run_folder import RunFolder

    device.configure(options)  # before CUDA starts
    method = registry.load_class("methods", name)(options, distributed.device())
    return loop.train(method, RunFolder(name, options))


if __name__ == "__main__":
    cli.run("train.py", main)
