"""The latents of all views of all images, and the context of all prompts if the text encoder does not train,
computed once: in memory, or in files that runs and ranks share.

A file holds some values, the means and deviations of views or the contexts of prompts, and for each the
digest of what it was made from and of itself. Files are written whole, under names that depend on what is in
them, and never changed. So a killed run leaves those that it had finished, and two that write at once only do
the same work twice.
"""

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minisd import files
from minisd.data.crop import View
from minisd.data.order import Stream
from minisd.methods._base import Method
from minisd.options import require
from minisd.terminal import BRIEF
from minisd.training.distributed import Processes

SHARD = 32 * 2**20  # bytes of the latents in a file
DIGEST = 16  # bytes
STALE = 3600  # seconds after which a temporary file is one that a killed run left


def cache(stream: Stream, method: Method, processes: Processes, folder: Path) -> None:
    """Give the stream the latents of all its views: from --latents_dir, or from memory if they fit into
    --latents_memory, or else from `folder`. With --latents_dir, give the method the context of all prompts.
    ValueError if --latents_dir is given where these cannot be listed."""
    o, sd, dataset = method.options, method.sd, stream.dataset
    views = dataset.views()
    if views is None:
        why = "crops are random here; --center_crop makes them fixed"
        why = "those of an index are not kept" if dataset.lanes else why
        require(o.latents_dir is None, f"--latents_dir: {why}")
        return
    pixels = sum(view.shape[0] * view.shape[1] for view in views)
    size = pixels // sd.downscale**2 * sd.channels * 8  # bytes of means and deviations
    place = o.latents_dir
    if place is None and size > o.latents_memory * 2**30:
        place = folder / "latents"
        if processes.first:
            print(f"the latents take {size / 2**30:.3g} GB, more than --latents_memory: they are in {place}")
    if place is None:
        together = 1 if method.encodes_alone else o.train_batch_size
        return cache_latents(stream, sd.encode_images, together, processes)

    def encode(view: View) -> Tensor:
        return torch.cat(sd.encode_images(dataset.pixels(view)[None]))  # (2, 4, h, w)

    identities, vae = {view: dataset.identity(view) for view in views}, digest(sd.vae, method.device.type)
    stream.moments = store(place / vae, identities, encode, "images", processes)
    prompts = None if method.trains("text_encoder") or not o.latents_dir else dataset.prompts()
    if prompts:
        words = sd.tokenizer.bpe.to_str(), sd.tokenizer.placeholders, sd.tokenizer.max_length
        place /= digest(sd.text_encoder, method.device.type, method.dtype, *words)
        same, encode_text = dict(zip(prompts, prompts, strict=True)), lambda p: method.frozen_context([p])[0]
        method.stored_contexts = store(place, same, encode_text, "prompts", processes)


def store(
    folder: Path, identities: Mapping[Hashable, str], encode: Callable, what: str, processes: Processes
) -> "Stored":
    """The values of all keys of `identities`, after `encode` has made those that are not in the folder yet,
    shared among the processes."""
    processes.wait()  # until the first has removed from the folder what a killed run left
    stored = Stored(folder, identities)
    for share, world in ((processes.rank, processes.world), (0, 1)):
        # The second time only what is missing still: of processes that do not share the folder.
        missing = [key for i, key in enumerate(identities) if i % world == share and key not in stored]
        encoded = ((key, encode(key)) for key in missing)
        bar = BRIEF if missing else BRIEF | {"disable": True}
        write(stored, tqdm(encoded, f"encoding {what}", len(missing), **bar))
        processes.wait()
        stored.look()
    return stored


def cache_latents(stream: Stream, encode: Callable, batch_size: int, processes: Processes) -> None:
    """Encode every view of every image once, shared among the processes. Mean and deviation are kept, so that
    the posterior is sampled anew at each use."""
    moments = {}
    parts = stream.views(batch_size)[processes.rank :: processes.world]
    for part in tqdm(parts, desc="encoding images", **BRIEF):
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        for view, *found in zip(part, mean.cpu(), std.cpu(), strict=True):
            moments[view] = tuple(t.clone() for t in found)  # pickled as a part, it would bring the whole
    for shared in processes.gather(moments):
        stream.moments.update(shared)


def write(stored: "Stored", encoded: Iterable[tuple[Hashable, Tensor]]) -> None:
    """Write the values of keys, which come one by one, so that their bits do not depend on each other."""
    shard, size = {}, 0
    for key, value in encoded:
        value = value.cpu()
        if shard and (size + value.nbytes > SHARD or value.shape != next(iter(shard.values())).shape):
            stored.add(shard)
            shard, size = {}, 0
        shard[stored.keys_of[key]] = value
        size += value.nbytes
    if shard:
        stored.add(shard)


def digest(network: nn.Module, *further: object) -> str:
    """The digest of what the network computes, besides its inputs: config, weights, their type, and `further`
    texts."""
    sha = hashlib.sha256(repr((network.config, *further)).encode())
    for name, tensor in network.state_dict().items():
        sha.update(f"{name} {tensor.dtype}".encode())
        sha.update(_bytes(tensor.cpu()))
    return sha.hexdigest()[: 2 * DIGEST]


class Stored:
    """The values of keys, read from the files of a folder when they are used, mapped into memory.
    `identities` are texts with all that the value of each key depends on."""

    def __init__(self, folder: Path, identities: Mapping[Hashable, str]):
        self.folder = folder
        self.keys_of = {
            key: hashlib.blake2b(text.encode(errors="replace"), digest_size=DIGEST).digest()
            for key, text in identities.items()
        }
        self.shards: dict[Path, dict[str, Tensor]] = {}
        self.places: dict[bytes, tuple[Path, int]] = {}  # file and row of each key
        for path in files.leftovers(folder) if folder.is_dir() else ():
            with suppress(OSError):  # gone, or of another user
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        self.look()

    def look(self) -> None:
        """Take note of the files that are new in the folder, and pass over damaged ones."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self.shards:
                continue
            try:
                shard, metadata = files.read_with_metadata(path)
                whole = {"keys", "sums", "values"} == shard.keys() and metadata.get("index") == _index(shard)
                require(whole and len({len(t) for t in shard.values()}) == 1, f"{path} is damaged")
            except ValueError as e:
                print(f"passing over what was encoded: {e}")
                continue
            self.shards[path] = shard
            for row, key in enumerate(shard["keys"].numpy()):
                self.places.setdefault(key.tobytes(), (path, row))

    def add(self, shard: dict[bytes, Tensor]) -> None:
        """Write a file of these values, of one shape, by digest of their key."""
        values = torch.stack(list(shard.values()))
        keys, sums = (
            torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
            for digests in (shard, map(_sum, values))
        )
        tensors = {"keys": keys, "sums": sums, "values": values}
        name = hashlib.sha256(b"".join(shard)).hexdigest()[: 2 * DIGEST]
        files.write(self.folder / f"{name}.safetensors", tensors, {"index": _index(tensors)})

    def __contains__(self, key: Hashable) -> bool:
        return self.keys_of.get(key) in self.places

    def __getitem__(self, key: Hashable) -> Tensor:
        """ValueError, naming the file, if the value is not what was written."""
        path, row = self.places[self.keys_of[key]]
        value = self.shards[path]["values"][row].clone()
        if _sum(value) != self.shards[path]["sums"][row].numpy().tobytes():
            raise ValueError(f"--latents_dir: {path} is damaged; without it, its values are computed again")
        return value


def _index(shard: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(_bytes(shard[name]).tobytes() for name in ("keys", "sums"))).hexdigest()


def _sum(value: Tensor) -> bytes:
    return hashlib.blake2b(_bytes(value), digest_size=DIGEST).digest()


def _bytes(tensor: Tensor) -> numpy.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
