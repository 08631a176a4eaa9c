"""The endless sequence of samples, cut into batches.

Sample number k of a run is a function of (seed, k): its index in the shuffled epoch, its augmentation and its
noise. So the number is enough to resume a run, and neither the batch size nor the workers nor the devices
change what is drawn. With buckets the index also depends on the size of a round (the batches of all
processes together), because a round holds images of one bucket.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minisd import noise

if TYPE_CHECKING:
    from minisd.data.crop import View
    from minisd.data.datasets import Captioned, Prior


class Shuffled:
    """Endless permutations of the indices below `length`, one for each epoch, drawn from (*names, epoch)."""

    def __init__(self, length: int, *names: object):
        self.length, self.names = length, names
        self._latest: tuple[int, Any] | None = None

    def draw(self, epoch: int) -> Any:
        """The permutation of an epoch, (length,)."""
        return torch.randperm(self.length, generator=noise.generator(*self.names, epoch))

    def epoch(self, epoch: int) -> Any:
        """As `draw`; the latest epoch is kept."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self.draw(epoch)
        return self._latest[1]

    def __getitem__(self, number: int) -> int:
        """The index of sample `number` in the dataset."""
        epoch, position = divmod(number, self.length)
        return self.epoch(epoch)[position].item()


class Bucketed(Shuffled):
    """Each round of `size` samples is of one bucket, and still every index occurs equally often.

    An epoch has as many rounds as the dataset has indices, n. A bucket of m indices has m of these rounds, in
    an order drawn from (seed, epoch). The m * size samples that a bucket has in an epoch are `size`
    permutations of its indices, one after the other. So each index occurs exactly `size` times, and no round
    is short or filled up with images that then count twice.
    """

    def __init__(self, buckets: Sequence, seed: int, size: int):
        super().__init__(len(buckets), seed, "buckets")
        numbers = {bucket: number for number, bucket in enumerate(sorted(set(buckets)))}
        self.buckets = torch.tensor([numbers[bucket] for bucket in buckets])  # (n,)
        self.members = [(self.buckets == n).nonzero().flatten() for n in numbers.values()]  # (m,) each
        self.seed, self.size = seed, size

    def draw(self, epoch: int) -> tuple[Tensor, Tensor, list[Shuffled]]:
        """The bucket of each round (n,), the number of earlier rounds with it (n,), and the permutations of
        each bucket."""
        rounds = self.buckets[super().draw(epoch)]
        earlier = torch.empty_like(rounds)
        for bucket, members in enumerate(self.members):
            earlier[rounds == bucket] = torch.arange(len(members))
        names = self.seed, "order", epoch
        return rounds, earlier, [Shuffled(len(m), *names, bucket) for bucket, m in enumerate(self.members)]

    def __getitem__(self, number: int) -> int:
        number, position = divmod(number, self.size)
        epoch, number = divmod(number, self.length)
        rounds, earlier, permutations = self.epoch(epoch)
        bucket = rounds[number].item()
        position += earlier[number].item() * self.size
        return self.members[bucket][permutations[bucket][position]].item()


class Lanes:
    """The order of an index's rows, computed for each sample: no list of rows is kept.

    Whole shards are dealt out to lanes, and sample k is of lane k mod their number. In each epoch the shards
    of a lane come in another order, `window` of them at a time, and the rows of these in a permutation. When
    the smallest lane is at its end, what the others have left follows, in a permutation too. So an epoch has
    each row once; and of processes whose number divides that of the lanes no two read the same shard, but for
    what is left at the end, which is nothing if lanes are equal.
    """

    def __init__(self, rows: Sequence[int], lanes: int, window: int, seed: int):
        self.rows, self.window, self.seed = rows, window, seed
        self.starts = [0, *itertools.accumulate(rows)]  # of the shards
        self.length = self.starts[-1]
        self.lanes: list[list[int]] = [[] for _ in range(lanes)]  # their shards
        heap = [(0, lane) for lane in range(lanes)]
        for shard in sorted(range(len(rows)), key=lambda shard: -rows[shard]):  # the largest first
            size, lane = heap[0]
            self.lanes[lane].append(shard)
            heapq.heapreplace(heap, (size + rows[shard], lane))
        sizes = [size for _, size in sorted((lane, size) for size, lane in heap)]
        self.least = min(sizes)
        self.rest = list(itertools.accumulate(size - self.least for size in sizes))
        self._latest: dict[int, tuple[int, list[int], list[int]]] = {}

    def __getitem__(self, number: int) -> int:
        """The row of sample `number`."""
        epoch, position = divmod(number, self.length)
        if (left := position - self.least * len(self.lanes)) < 0:
            return self._row(epoch, number % len(self.lanes), position // len(self.lanes))
        left = noise.permuted(left, self.rest[-1], self.seed, "rest", epoch)
        lane = bisect_right(self.rest, left)
        return self._row(epoch, lane, self.least + left - _before(self.rest, lane))

    def _row(self, epoch: int, lane: int, position: int) -> int:
        """The row at a position of an epoch of a lane."""
        if self._latest.get(lane, (None,))[0] != epoch:
            generator = noise.generator(self.seed, "order", epoch, lane)
            order = torch.randperm(len(self.lanes[lane]), generator=generator).tolist()
            shards = [self.lanes[lane][i] for i in order]
            self._latest[lane] = epoch, shards, [*itertools.accumulate(self.rows[s] for s in shards)]
        _, shards, ends = self._latest[lane]
        first = bisect_right(ends, position) // self.window * self.window  # shard of the window
        start, end = _before(ends, first), ends[min(first + self.window, len(ends)) - 1]
        names = self.seed, "rows", epoch, lane, first
        position = start + noise.permuted(position - start, end - start, *names)
        place = bisect_right(ends, position)
        return self.starts[shards[place]] + position - _before(ends, place)


def _before(ends: list[int], i: int) -> int:
    return ends[i - 1] if i else 0


class Stream:
    """Sample k as a list of {"number", "prompt", "weight"} with either "pixels" (3, h, w) or the cached
    "mean" and "std" of its latents: one dict per example at its index (with prior preservation an instance
    and an image of its class)."""

    def __init__(self, dataset: Captioned | Prior, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.moments: Any = {}  # view -> mean, std of its latents; see training/latents.py
        self.arrange(1)

    def arrange(self, size: int) -> None:
        """Set the size of a round, which is of one bucket if the dataset has buckets."""
        if self.dataset.lanes is not None:
            self.order = Lanes(*self.dataset.lanes, self.seed)
        elif self.dataset.buckets is None:
            self.order = Shuffled(len(self.dataset), self.seed, "order")
        else:
            self.order = Bucketed(self.dataset.buckets, self.seed, size)

    def views(self, size: int) -> list[list[View]]:
        """All possible views, in parts of at most `size` of one shape; none if crops are random."""
        parts = []
        for _, group in itertools.groupby(self.dataset.views() or [], key=lambda view: view.shape):
            alike = list(group)
            parts += [alike[start : start + size] for start in range(0, len(alike), size)]
        return parts

    def __getitem__(self, number: int) -> list[dict]:
        samples, generator = [], noise.generator(self.seed, "augment", number)
        for i, example in enumerate(self.dataset.examples(self.order[number], generator)):
            sample = {"number": f"{number}+{i}" if i else number, "prompt": example.prompt}
            sample |= {"weight": torch.tensor(example.weight)} | self.dataset.extras(example.view)
            if example.view in self.moments:
                sample["mean"], sample["std"] = self.moments[example.view]
            elif (pixels := self.dataset.pixels(example.view)) is not None:
                sample["pixels"] = pixels
            samples.append(sample)
        return samples

    def __getitems__(self, numbers: list[int]) -> list[list[dict]] | ValueError:
        """The samples of a batch, or what is wrong with an image in it: the DataLoader gives an error that is
        raised in one of its processes the text of a traceback."""
        try:
            return [self[number] for number in numbers]
        except ValueError as e:
            return e


def collate(samples: list[list[dict]]) -> dict:
    """A batch: the first example of each sample, then the second ones; tensors stacked, all else in lists."""
    examples = [example for row in zip(*samples, strict=True) for example in row]
    columns = {key: [e[key] for e in examples] for key in examples[0]}
    return {k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}


def _collated(samples: list[list[dict]] | ValueError) -> dict | ValueError:
    return samples if isinstance(samples, ValueError) else collate(samples)


def _raised(batch: dict | ValueError) -> dict:
    if isinstance(batch, ValueError):
        raise batch
    return batch


def shares(first: int, count: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """The numbers of the samples of `count` batches from `first` on: of each round every `world`-th one, so
    that a process always reads the same lanes."""
    size = batch_size * world
    return (range(start + rank, start + size, world) for start in range(first, first + count * size, size))


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
    """Yield `count` batches from sample `first` on, for process `rank` of the `world` that share each round.
    ValueError if the dataset has buckets and `first` is within a round; for an image that cannot be decoded,
    when its batch is due."""
    size = batch_size * world
    if stream.dataset.buckets is not None and first % size:
        raise ValueError(
            f"--bucket: sample {first} is within a round of {size}; "
            "continue with the --train_batch_size and the number of processes of the run"
        )
    stream.arrange(size)
    sampler = shares(first, count, batch_size, rank, world)
    loading = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    return map(_raised, DataLoader(stream, batch_sampler=sampler, collate_fn=_collated, **loading))
