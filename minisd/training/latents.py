"""Encoding the training images once instead of in every update."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from minisd.data.batches import Stream
from minisd.training.distributed import Processes


def cache_latents(stream: Stream, encode: Callable, batch_size: int, processes: Processes) -> None:
    """Encode every view of every image once, each process its share. Mean and deviation are kept, so that
    each use samples anew."""
    moments = {}
    parts = stream.views(batch_size)[processes.rank :: processes.world]
    for part in tqdm(parts, desc="encoding pictures", leave=False, disable=not processes.first):
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        moments.update(zip(part, zip(mean.cpu(), std.cpu(), strict=True), strict=True))
    for shared in processes.gather(moments):
        stream.moments.update(shared)
