"""The inputs of one run, of sample.py or of `generate` in Python."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from minisd.sampling.input_images import InputImages
from minisd.sampling.options import Drawing
from minisd.sampling.prompt import parse_all

if TYPE_CHECKING:
    from minisd.sampling.api import Model, PixelModel


class Request:
    """The inputs of one run that need no model: prompts, parsed, and input images, opened."""

    def __init__(self, options: Drawing, texts: list[str]):
        self.options = options
        self.images = InputImages(options) if options.image or options.controlnet else None
        texts = self.images.prompts(texts) if self.images else texts
        self.prompts = [prompt for prompt in parse_all(texts, options) for _ in range(options.num_images)]

    def arguments(self, model: Model | PixelModel) -> dict:
        """The keywords of `draw` for this model. ValueError, naming the flag, if one has no effect on it."""
        model.accept(self.options)
        settings, count = copy(self.options), len(self.prompts)
        if self.images:
            self.images.complete(settings, model)
        settings.width = settings.width or model.default_size
        settings.height = settings.height or model.default_size
        return {
            "prompts": self.prompts,
            "seeds": [settings.seed + i for i in range(count)],
            "settings": settings,
            "batch_size": settings.batch_size or (1 if model.device.type == "cpu" else 4),
            **(self.images.tensors(model, settings, count) if self.images else {}),
        }
