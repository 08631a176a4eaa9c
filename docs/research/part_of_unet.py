"""Train some modules of the UNet, such as its cross-attention, on captioned images.

    python train.py --method docs/research/part_of_unet.py --data ./cat --train_modules attn2
    python train.py --method docs/research/part_of_unet.py --help

The class has the file's name. `build` says what trains; all else is as in minisd/methods/_base.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minisd import Method
from minisd.options import Captions, Training, flag, require

if TYPE_CHECKING:
    from torch.nn import Parameter

    from minisd.sampling.stable_diffusion import StableDiffusion


class Options(Captions, Training):
    """Part of the UNet"""

    train_modules: list[str] = flag(
        ["attn2"], "train the modules of the UNet with one of these in their name"
    )
    learning_rate: float = flag(1e-4)
    output_dir: Path = flag(Path("part-of-unet"))


class PartOfUNet(Method):
    """Of the UNet only the named modules train."""

    def build(self, sd: "StableDiffusion") -> "dict[str, Parameter]":
        trained = super().build(sd)
        for module in (names := self.options.train_modules):
            known = any(f".{module}." in name for name in trained if name.startswith("unet."))
            require(known, f"--train_modules {module}: no module of the UNet has this in its name")
        for name in [n for n in trained if n.startswith("unet.") and not any(f".{m}." in n for m in names)]:
            trained.pop(name).requires_grad_(False)
        return trained
