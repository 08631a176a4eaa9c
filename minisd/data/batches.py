"""The endless stream of samples, cut into batches.

Sample number k of a run is a function of (seed, k): its place in the shuffled epoch, its augmentation, its
noise. So resuming needs the number alone, and neither the batch size nor the workers nor the devices change
what is drawn. With buckets the place is a function of the size of a round too (the batches of all processes
together), because a round holds pictures of one bucket.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minisd import noise
from minisd.data.datasets import Example


class Shuffled:
    """Each epoch is a permutation of the dataset, drawn by (seed, epoch)."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._last: tuple[int, Tensor] | None = None

    def epoch(self, epoch: int) -> Tensor:
        """The dataset's places in the order of an epoch."""
        if self._last is None or self._last[0] != epoch:
            order = torch.randperm(self.length, generator=noise.generator(self.seed, "order", epoch))
            self._last = epoch, order
        return self._last[1]

    def __getitem__(self, number: int) -> int:
        """The place of sample `number`."""
        epoch, place = divmod(number, self.length)
        return self.epoch(epoch)[place].item()


class Bucketed:
    """Each round of `size` samples is of one bucket, and yet every place counts the same.

    A cycle has as many rounds as the dataset has places, n, and each bucket of m places has m of them, in an
    order drawn by (seed, cycle). The m * size samples that a bucket has in a cycle are `size` permutations of
    its places, one after the other. So each place stands in a cycle exactly `size` times, without a round
    that is short, or filled up with pictures that then count twice. Rounds of 1 are Shuffled's law.
    """

    def __init__(self, buckets: Sequence, seed: int, size: int):
        names = sorted(set(buckets))
        self.members = [[i for i, b in enumerate(buckets) if b == name] for name in names]
        self.owner = torch.tensor([names.index(b) for b in buckets])  # (n,) the bucket of each place
        self.seed, self.size = seed, size
        self._cycle: tuple[int, list[tuple[int, int]]] | None = None
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def _rounds(self, cycle: int) -> list[tuple[int, int]]:
        """The bucket of each round of a cycle, and how many rounds it had before in the cycle."""
        if self._cycle is None or self._cycle[0] != cycle:
            generator = noise.generator(self.seed, "buckets", cycle)
            had, rounds = [0] * len(self.members), []
            for bucket in self.owner[torch.randperm(len(self.owner), generator=generator)].tolist():
                rounds.append((bucket, had[bucket]))
                had[bucket] += 1
            self._cycle = cycle, rounds
        return self._cycle[1]

    def _order(self, cycle: int, bucket: int, turn: int) -> Tensor:
        key = cycle, bucket, turn
        if key not in self._orders:
            if len(self._orders) > 4 * len(self.members):  # only the latest are asked for again
                self._orders.clear()
            generator = noise.generator(self.seed, "order", cycle, bucket, turn)
            self._orders[key] = torch.randperm(len(self.members[bucket]), generator=generator)
        return self._orders[key]

    def __getitem__(self, number: int) -> int:
        """The place of sample `number`."""
        round_, inside = divmod(number, self.size)
        cycle, round_ = divmod(round_, len(self.owner))
        bucket, had = self._rounds(cycle)[round_]
        members = self.members[bucket]
        turn, place = divmod(had * self.size + inside, len(members))
        return members[self._order(cycle, bucket, turn)[place].item()]


class Stream:
    """Sample k as a list of {"number", "prompt", "weight"} and either "pixels" (3, h, w) or cached "mean" and
    "std": one for each example that stands at that place (an instance and a picture of its class, say)."""

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.moments: dict[object, tuple[Tensor, Tensor]] = {}  # view -> mean, std of its latents
        self.arrange(1)

    def arrange(self, size: int) -> None:
        """Let each round of `size` samples be of one bucket, if the dataset has buckets."""
        if self.dataset.buckets is None:
            self.order = Shuffled(len(self.dataset), self.seed)
        else:
            self.order = Bucketed(self.dataset.buckets, self.seed, size)

    def __getitem__(self, number: int) -> list[dict]:
        generator = noise.generator(self.seed, "augment", number)
        examples = self.dataset.examples(self.order[number], generator)
        return [self._load(e, f"{number}+{i}" if i else number) for i, e in enumerate(examples)]

    def _load(self, example: Example, number: int | str) -> dict:
        sample = {"number": number, "prompt": example.prompt, "weight": torch.tensor(example.weight)}
        if example.view in self.moments:
            sample["mean"], sample["std"] = self.moments[example.view]
        else:
            sample["pixels"] = self.dataset.pixels(example.view)
        return sample | self.dataset.extras(example.view)


def collate(places: list[list[dict]]) -> dict:
    """The first examples of all places, then the second ones: tensors stacked, everything else in lists."""
    samples = [sample for row in zip(*places, strict=True) for sample in row]
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
    """`count` batches from sample number `first` on, for this process of `world`. ValueError if the dataset
    has buckets and `first` is within a round."""
    if stream.dataset.buckets is not None and first % (batch_size * world):
        raise ValueError(
            f"--bucket: sample {first} is within a round of {batch_size * world}; "
            "go on with the --train_batch_size and the number of processes that the run had"
        )
    stream.arrange(batch_size * world)
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
