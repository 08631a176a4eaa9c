"""The latents of all views of all images, encoded once: in memory, or in files that runs and ranks share.

A file holds the means and deviations of some views, and for each the digest of what it was made from and of
its values. Files are written whole, under names that depend on what is in them, and never changed. So a
killed run leaves those that it had finished, and two that write at the same time do double work at worst.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
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
    --latents_memory, or else from `folder`. ValueError if crops are random and --latents_dir is given."""
    o, sd, views = method.options, method.sd, stream.dataset.views()
    if views is None:
        require(o.latents_dir is None, "--latents_dir: crops are random here; --center_crop makes them fixed")
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
    processes.wait()  # until the first has removed from the folder what a killed run left
    stored = Stored(place / vae_digest(method), {view: stream.dataset.identity(view) for view in views})
    for share, world in ((processes.rank, processes.world), (0, 1)):
        # The second time only what is missing still: of processes that do not share the folder.
        missing = [view for i, view in enumerate(views) if i % world == share and view not in stored]
        encoded = ((view, sd.encode_images(stream.dataset.pixels(view)[None])) for view in missing)
        shown = processes.first and bool(missing)
        write(stored, tqdm(encoded, "encoding images", len(missing), disable=not shown, **BRIEF))
        processes.wait()
        stored.look()
    stream.moments = stored


def cache_latents(stream: Stream, encode: Callable, batch_size: int, processes: Processes) -> None:
    """Encode every view of every image once, shared among the processes. Mean and deviation are kept, so that
    the posterior is sampled anew at each use."""
    moments = {}
    parts = stream.views(batch_size)[processes.rank :: processes.world]
    for part in tqdm(parts, desc="encoding images", disable=not processes.first, **BRIEF):
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        for view, *found in zip(part, mean.cpu(), std.cpu(), strict=True):
            moments[view] = tuple(t.clone() for t in found)  # pickled as a part, it would bring the whole
    for shared in processes.gather(moments):
        stream.moments.update(shared)


def write(stored: "Stored", encoded: Iterable[tuple[View, tuple[Tensor, Tensor]]]) -> None:
    """Write the means and deviations (1, 4, h, w) of views, which come one by one, so that their bits do not
    depend on each other."""
    shard, size = {}, 0
    for view, pair in encoded:
        moments = torch.cat(pair).cpu()  # (2, 4, h, w)
        if shard and (size + moments.nbytes > SHARD or moments.shape != next(iter(shard.values())).shape):
            stored.add(shard)
            shard, size = {}, 0
        shard[stored.keys_of[view]] = moments
        size += moments.nbytes
    if shard:
        stored.add(shard)


def vae_digest(method: Method) -> str:
    """The digest of what latents depend on besides the image: weights, their type, and the device's kind."""
    vae = method.sd.vae
    sha = hashlib.sha256(repr((vae.config, method.device.type)).encode())
    for name, tensor in vae.state_dict().items():
        sha.update(f"{name} {tensor.dtype}".encode())
        sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[: 2 * DIGEST]


class Stored:
    """Mean and deviation of views, read from the files of a folder when they are used, mapped into memory.
    `identities` are texts with all that the pixels of each view depend on."""

    def __init__(self, folder: Path, identities: Mapping[View, str]):
        self.folder = folder
        self.keys_of = {
            view: hashlib.blake2b(text.encode(errors="replace"), digest_size=DIGEST).digest()
            for view, text in identities.items()
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
                whole = {"keys", "sums", "moments"} == shard.keys() and metadata.get("index") == _index(shard)
                require(whole and len({len(t) for t in shard.values()}) == 1, f"{path} is damaged")
            except ValueError as e:
                print(f"passing over latents: {e}")
                continue
            self.shards[path] = shard
            for row, key in enumerate(shard["keys"].numpy()):
                self.places.setdefault(key.tobytes(), (path, row))

    def add(self, shard: dict[bytes, Tensor]) -> None:
        """Write a file of these moments (2, 4, h, w) by key."""
        moments = torch.stack(list(shard.values()))
        keys, sums = (
            torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
            for digests in (shard, map(_sum, moments))
        )
        tensors = {"keys": keys, "sums": sums, "moments": moments}
        name = hashlib.sha256(b"".join(shard)).hexdigest()[: 2 * DIGEST]
        files.write(self.folder / f"{name}.safetensors", tensors, {"index": _index(tensors)})

    def __contains__(self, view: View) -> bool:
        return self.keys_of.get(view) in self.places

    def __getitem__(self, view: View) -> tuple[Tensor, Tensor]:
        """ValueError, naming the file, if the values are not those that were written."""
        path, row = self.places[self.keys_of[view]]
        moments = self.shards[path]["moments"][row].clone()
        if _sum(moments) != self.shards[path]["sums"][row].numpy().tobytes():
            raise ValueError(f"--latents_dir: {path} is damaged; without it, its latents are computed again")
        return tuple(moments.unbind())


def _index(shard: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(shard[name].numpy().tobytes() for name in ("keys", "sums"))).hexdigest()


def _sum(moments: Tensor) -> bytes:
    return hashlib.blake2b(moments.numpy(), digest_size=DIGEST).digest()
