"""Pictures that come in pairs: ControlNet's and InstructPix2Pix's."""

import torch

from minisd.data.datasets import Captioned, Size
from minisd.data.records import Source


class Conditioned(Captioned):
    """ControlNet's pictures, each with its condition as the extra "conditioning", (3, h, w) in [0, 1]: the
    shorter side resized, the centred square cut out of both, nothing flipped. ValueError, naming the flag,
    for a column that is missing and for a pair of unequal shapes."""

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        conditioning_column: str = "conditioning_image",
        **kwargs,
    ):
        super().__init__(source, resolution=resolution, center_crop=True, **kwargs)
        flag = "--conditioning_image_column"
        self.conditioning_column = source.column(conditioning_column, flag=flag, of="pictures")
        source.check_pairs(self.image_column, self.conditioning_column, flag=flag)

    def extras(self, view) -> dict[str, torch.Tensor]:
        return {"conditioning": self.tensor(view, self.conditioning_column) / 2 + 0.5}


class EditPairs(Captioned):
    """InstructPix2Pix's pictures after the edit, each with the one before as the extra "original", (3, h, w)
    in [-1, 1]: both squashed to a square, or with `center_crop` cut to one; both flipped or neither.
    ValueError, naming the flag, for a column that is missing and for a pair of unequal shapes."""

    IMAGE_FLAG, CAPTION_FLAG = "--edited_image_column", "--edit_prompt_column"

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        center_crop: bool = False,
        original_column: str = "input_image",
        edited_column: str = "edited_image",
        prompt_column: str = "edit_prompt",
        interpolation: str = "bicubic",
        **kwargs,
    ):
        self.squash = not center_crop
        super().__init__(
            source,
            resolution=resolution,
            center_crop=True,
            image_column=edited_column,
            caption_column=prompt_column,
            interpolation=interpolation,
            **kwargs,
        )
        flag = "--original_image_column"
        self.original_column = source.column(original_column, flag=flag, of="pictures")
        source.check_pairs(self.image_column, self.original_column, flag=flag)

    def scaled(self, size: Size, shape: Size) -> Size:
        return shape if self.squash else super().scaled(size, shape)

    def extras(self, view) -> dict[str, torch.Tensor]:
        return {"original": self.tensor(view, self.original_column)}
