"""The endless sequence of samples, cut into batches.

Sample number k of a run is a function of (seed, k): its index in the shuffled epoch, its augmentation, its
noise. So to resume a run the number is enough, and neither the batch size nor the workers nor the devices
change what is drawn. With buckets the index is a function of the size of a round too (the batches of all
processes together), because a round holds pictures of one bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minisd import noise

if TYPE_CHECKING:
    from minisd.data.crop import View
    from minisd.data.datasets import Captioned, Example, Prior


class Shuffled:
    """Each epoch is a permutation of the dataset, a function of (seed, epoch)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._last: tuple[int, Tensor] | None = None

    def epoch(self, epoch: int) -> Tensor:
        """The indices of the dataset in the order of an epoch, (length,)."""
        if self._last is None or self._last[0] != epoch:
            order = torch.randperm(self.length, generator=noise.generator(self.seed, "order", epoch))
            self._last = epoch, order
        return self._last[1]

    def __getitem__(self, number: int) -> int:
        """The index of sample `number` in the dataset."""
        epoch, position = divmod(number, self.length)
        return self.epoch(epoch)[position].item()


class Bucketed:
    """Each round of `size` samples is of one bucket, and still every index occurs equally often.

    A cycle has as many rounds as the dataset has indices, n. A bucket of m indices has m of these rounds, in
    an order that is a function of (seed, cycle). The m * size samples that a bucket has in a cycle are `size`
    permutations of its indices, one after the other. So each index occurs exactly `size` times in a cycle,
    and no round is short or filled up with pictures that then count twice.
    """

    def __init__(self, buckets: Sequence, seed: int, size: int):
        names = sorted(set(buckets))
        self.members = [[i for i, b in enumerate(buckets) if b == name] for name in names]
        number = {name: i for i, name in enumerate(names)}
        self.owner = torch.tensor([number[b] for b in buckets])  # (n,) the bucket of each index
        self.seed, self.size = seed, size
        self._cycle: tuple[int, Tensor, Tensor] | None = None
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def _round(self, cycle: int, number: int) -> tuple[int, int]:
        """The bucket of a round of a cycle, and how many earlier rounds of the cycle are of that bucket."""
        if self._cycle is None or self._cycle[0] != cycle:
            generator = noise.generator(self.seed, "buckets", cycle)
            rounds = self.owner[torch.randperm(len(self.owner), generator=generator)]  # (n,)
            earlier = torch.empty_like(rounds)  # (n,)
            for bucket, members in enumerate(self.members):
                earlier[rounds == bucket] = torch.arange(len(members))
            self._cycle = cycle, rounds, earlier
        return self._cycle[1][number].item(), self._cycle[2][number].item()

    def _order(self, cycle: int, bucket: int, turn: int) -> Tensor:
        """Permutation number `turn` of a bucket in a cycle."""
        key = cycle, bucket, turn
        if key not in self._orders:
            if len(self._orders) > 4 * len(self.members):  # only the latest are needed again
                self._orders.clear()
            generator = noise.generator(self.seed, "order", cycle, bucket, turn)
            self._orders[key] = torch.randperm(len(self.members[bucket]), generator=generator)
        return self._orders[key]

    def __getitem__(self, number: int) -> int:
        """The index of sample `number` in the dataset."""
        round_, inside = divmod(number, self.size)
        cycle, round_ = divmod(round_, len(self.owner))
        bucket, earlier = self._round(cycle, round_)
        members = self.members[bucket]
        turn, position = divmod(earlier * self.size + inside, len(members))
        return members[self._order(cycle, bucket, turn)[position].item()]


class Stream:
    """Sample k as a list of {"number", "prompt", "weight"} with either "pixels" (3, h, w) or the cached
    "mean" and "std" of its latents: one for each example at its index (an instance and a picture of its
    class, say)."""

    def __init__(self, dataset: Captioned | Prior, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.moments: dict[View, tuple[Tensor, Tensor]] = {}  # mean, std of a view's latents
        self.arrange(1)

    def arrange(self, size: int) -> None:
        """Make each round of `size` samples of one bucket, if the dataset has buckets."""
        if self.dataset.buckets is None:
            self.order = Shuffled(len(self.dataset), self.seed)
        else:
            self.order = Bucketed(self.dataset.buckets, self.seed, size)

    def views(self, size: int) -> list[list[View]]:
        """Every view there can be, in parts of at most `size` of one shape; none if crops are drawn."""
        parts = []
        for _, group in itertools.groupby(self.dataset.views() or [], key=lambda view: view.shape):
            alike = list(group)
            parts += [alike[start : start + size] for start in range(0, len(alike), size)]
        return parts

    def examples(self, number: int) -> list[Example]:
        """The examples of sample `number`: a function of the seed and the number alone (and, with buckets, of
        the size of a round)."""
        return self.dataset.examples(self.order[number], noise.generator(self.seed, "augment", number))

    def __getitem__(self, number: int) -> list[dict]:
        examples = enumerate(self.examples(number))
        return [self._load(example, f"{number}+{i}" if i else number) for i, example in examples]

    def _load(self, example: Example, number: int | str) -> dict:
        sample = {"number": number, "prompt": example.prompt, "weight": torch.tensor(example.weight)}
        if example.view in self.moments:
            sample["mean"], sample["std"] = self.moments[example.view]
        else:
            sample["pixels"] = self.dataset.pixels(example.view)
        return sample | self.dataset.extras(example.view)


def collate(samples: list[list[dict]]) -> dict:
    """A batch: the first examples of all samples, then the second ones; tensors stacked, all else in
    lists."""
    examples = [example for row in zip(*samples, strict=True) for example in row]
    columns = {key: [e[key] for e in examples] for key in examples[0]}
    return {k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}


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
    """`count` batches from sample number `first` on, for process `rank` of `world`, which share every round.
    ValueError if the dataset has buckets and `first` is within a round."""
    size = batch_size * world
    if stream.dataset.buckets is not None and first % size:
        raise ValueError(
            f"--bucket: sample {first} is within a round of {size}; "
            "go on with the --train_batch_size and the number of processes that the run had"
        )
    stream.arrange(size)
    starts = range(first + rank * batch_size, first + count * size, size)
    loader = DataLoader(
        stream,
        batch_sampler=(range(start, start + batch_size) for start in starts),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
