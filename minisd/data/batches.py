"""The endless stream of samples, cut into batches.

Sample number k of a run is a function of (seed, k): its place in the shuffled epoch, its augmentation, its
noise. So resuming needs the number alone, and neither the batch size nor the workers nor the devices change
what is drawn.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minisd import noise


class Stream:
    """Sample k as {"number": k, "prompt": str} and either "pixels" (3, h, w) or cached "mean" and "std"."""

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.moments: dict[object, tuple[Tensor, Tensor]] = {}  # view -> mean, std of its latents
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, number: int) -> dict:
        epoch, place = divmod(number, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.dataset), generator=noise.generator(self.seed, "order", epoch))
            self._order = epoch, order
        index = self._order[1][place].item()
        view, prompt = self.dataset.example(index, noise.generator(self.seed, "augment", number))
        sample = {"number": number, "prompt": prompt}
        if view in self.moments:
            sample["mean"], sample["std"] = self.moments[view]
        else:
            sample["pixels"] = self.dataset.pixels(view)
        return sample


def collate(samples: list[dict]) -> dict:
    """Tensors stacked, everything else in lists."""
    columns = {key: [s[key] for s in samples] for key in samples[0]}
    return {k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}


class _Numbers:
    """The sample numbers of each batch of one process: `world` processes share every round."""

    def __init__(self, first: int, count: int, batch_size: int, rank: int, world: int):
        self.first, self.count, self.batch_size, self.rank, self.world = first, count, batch_size, rank, world

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.count):
            start = self.first + (i * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def batches(
    stream: Stream,
    *,
    first: int,
    count: int,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict]:
    """`count` batches from sample number `first` on, for this process of `world`."""
    numbers = _Numbers(first, count, batch_size, rank, world)
    return iter(
        DataLoader(
            stream,
            batch_sampler=numbers,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
