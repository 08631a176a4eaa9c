"""Files and folders: tensors are read lazily, and everything is written whole or not at all."""

import ctypes
import json
import math
import mmap
import os
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisd.options import require
from minisd.reading import check_regular, real

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

# Old training checkpoints hold their trainer's callbacks and NumPy scalars beside the weights. They are not
# needed: a class that accepts anything and does nothing replaces each of these.
INERT = re.compile(r"(pytorch_)?lightning(_fabric)?\..*|numpy\.(dtype|_?core\.multiarray\.scalar)")
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"  # the vectors of textual inversions of 2022
MAX_DEPTH = 4  # of nested dicts


class _ParameterDict(dict):
    def __setstate__(self, state: Any) -> None:
        self.update(state["_parameters"])


class _Inert:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a file, as `read_with_metadata` does."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a .safetensors file or a pickle.

    A pickle has no metadata. Only its `state_dict` is read, if it has one; a tensor in nested dicts is named
    by its keys, joined by dots. No code from a pickle is run.

    The tensors are memory-mapped privately: a page is read when it is used, and a change in place stays in
    memory. ValueError, naming the file, if it cannot be read.
    """
    path = Path(path)
    head = _head(path)
    if path.suffix != SAFETENSORS:
        return _read_pickle(path, is_zip=head.startswith(b"PK\x03\x04")), {}
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def let_go(tensors: Collection[Tensor]) -> None:
    """Free the memory of those tensors that are mapped from a file and unchanged since: it is read again when
    they are used. The others stay, as do all on other systems than Linux."""
    if sys.platform != "linux" or not tensors:
        return
    with open("/proc/self/maps") as lines:
        mapped = [line.split()[0].split("-") for line in lines if " /" in line]
    ranges = [(int(start, 16), int(end, 16)) for start, end in mapped]
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    for t in tensors:
        start, end = -(-t.data_ptr() // page) * page, (t.data_ptr() + t.nbytes) // page * page  # whole pages
        if any(first <= start < end <= last for first, last in ranges):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _head(path: Path) -> bytes:
    """Return the first bytes of a file of tensors. ValueError if it is missing, empty or of another kind."""
    check_regular(path, math.inf)
    require(path.suffix in (SAFETENSORS, *PICKLES), f"{path} is not one of {SAFETENSORS} {' '.join(PICKLES)}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error
    require(head, f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
    return head


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name if it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0][:200]


def _read_pickle(path: Path, *, is_zip: bool) -> dict[str, Tensor]:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        refused = [name for name in named if not INERT.fullmatch(name) and name != PARAMETER_DICT]
        # torch adds entries to plain dicts only, so the trainer's AttributeDict becomes one.
        inert = [(dict if n.endswith("Dict") else _Inert, n) for n in named if INERT.fullmatch(n)]
        # Before torch 1.6 files were not zip archives. Neither those nor compressed records can be mapped.
        mapped = is_zip and not any(entry.compress_type for entry in zipfile.ZipFile(path).infolist())
        if not refused:
            with torch.serialization.safe_globals([*inert, (_ParameterDict, PARAMETER_DICT)]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        # Before the reason, torch explains how to run the code after all.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or first_line(error)
        name = re.search(r"GLOBAL ([\w.]+)", reason)
        if not name:
            reason = reason.splitlines()[0][:200]
            raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
        refused = [name[1]]
    if refused:
        names = ", ".join(sorted(refused)[:3])
        raise ValueError(f"{path} asks for {names}; minisd reads only tensors from a pickle, never code")
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = dict(_flat(content, "", MAX_DEPTH, set()))
    require(tensors, f"{path} holds no named tensors")
    return tensors


def _flat(content: Any, prefix: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts; of a dict that occurs several times, once."""
    if not isinstance(content, dict) or not depth or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value.detach()
        elif isinstance(key, str):
            yield from _flat(value, f"{prefix}{key}.", depth - 1, seen)


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file: the same tensors and metadata give the same bytes. A .bin file, for programs
    that read no other, is written as a pickle, without metadata.

    The safetensors library orders the metadata differently in each run, and needs all tensors in memory at
    once; here they go from their device to the file one at a time. `path` may be the file that the tensors
    are mapped from. ValueError, naming the file, if it cannot be written.
    """
    if Path(path).suffix == ".bin":
        return write_pickle(path, tensors)
    assert all(isinstance(text, str) for text in (metadata or {}).values())
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    # Widest first, so that each tensor begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(numpy.from_dlpack(flat))  # after flat.numpy() its memory could not be freed at will


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file, whole or not at all. ValueError, naming the file, if it cannot be written."""
    with _replacing(path) as file:
        file.write(content)


def write_text(path: Path | str, text: str) -> None:
    """Write text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_pickle(path: Path | str, tensors: Mapping[str, Any]) -> None:
    """Write a .bin file, for programs that cannot read .safetensors."""
    with _replacing(path) as file:
        try:
            torch.save(dict(tensors), file)
        except RuntimeError as error:  # torch raises it in place of the disk's error
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from error


def write_json(path: Path | str, content: Any) -> None:
    """Write indented JSON, as `write_bytes` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _temporary(path: Path) -> Path:
    """Return an unused name in the same folder, and so on the same disk."""
    return path.parent / f".{path.name[:200]}.minisd-{secrets.token_hex(4)}.tmp"


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files and folders, at any depth, that killed processes left."""
    return [p for p in folder.rglob(".*.tmp") if re.fullmatch(r"\..+\.minisd-[0-9a-f]{8}\.tmp", p.name)]


def remove(path: Path) -> None:
    """Delete a file, a link or a folder. A folder goes whole, even if the process is killed: first it gets a
    name that `leftovers` finds."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.rename(_temporary(path))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _replacing(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file that is renamed to `path` when the block ends, and deleted if the block fails."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk, so that a power cut does not lose a file by its name.
    Some file systems cannot, and need not, do this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and let only one process at a time run such a block for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {first_line(error)}") from error
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # on file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path | str, *, keep: bool = False) -> Iterator[Path]:
    """Make a folder that is renamed to `path` when the block ends, and deleted if the block fails.

    An existing folder is replaced; with `keep`, only its entries of the same names are. If the process is
    killed between the two renames that this takes, the old folder remains beside `path`, as `.NAME.*.tmp`.
    """
    path = Path(path)
    path = real(path) if path.is_symlink() else real(path.parent) / path.name
    inside = keep and path.is_dir()  # which may be on another disk than its parent
    temporary = _temporary(path / path.name if inside else path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        if keep and path.is_dir():
            # Folders before files: an index is the last to change.
            for entry in sorted(temporary.iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
                _move(entry, path / entry.name)
        else:
            _move(temporary, path)
        _sync(path.parent)
        _sync(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {first_line(error)}") from error
    except ValueError as error:  # from a file inside: name the folder that the user knows
        raise ValueError(str(error).replace(str(temporary), str(path))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing it. A folder cannot be replaced, so it is moved aside first."""
    if not target.is_dir() or target.is_symlink():
        os.replace(source, target)
        return
    aside = _temporary(target)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
