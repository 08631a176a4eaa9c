"""Models by path, or by id on the Hugging Face hub, from where they are fetched and cached."""

import re
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from minisd import files
from minisd.formats import diffusers
from minisd.formats.parts import PARTS

CONFIG = "config.json"  # at the top of a repository that holds one network
# Models that old guides name, and where they are now.
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
TIMEOUT = 10  # seconds to wait for the hub before the cache is used


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the path of a folder or file to read: `model` itself if it exists, else `org/name` from the hub.

    Only the files that loading needs are fetched, and only once; without a network, only the cache is used.
    ValueError, naming the model, if there is no such path, id or revision, or if access is denied.
    """
    if not str(model):
        raise ValueError("no model was named")
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if not is_id(name):
        hint = "" if "/" in name else "; an id on the hub has the form org/name"
        raise ValueError(f"{name} does not exist{hint}")
    try:
        return _fetch(name, revision or "main", variant, cache_dir)
    except ValueError:
        if name not in MOVED:
            raise
    print(f"{name} is no longer on the hub: using {MOVED[name]}", file=sys.stderr)
    return _fetch(MOVED[name], revision or "main", variant, cache_dir)


def is_id(name: str) -> bool:
    """Whether a model's name that is no path is an id on the hub, and not the path of a missing file."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and ".." not in name
    return bool(named) and Path(name).suffix not in (files.SAFETENSORS, *files.PICKLES)


def pretrained(kinds: Sequence[str], source: str, flag: str) -> list:
    """Objects of these classes of transformers, from a folder, a hub id or a hub id and a folder in it.
    ValueError, naming the flag."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local, name, inside = Path(source).is_dir(), source, {}
    if not local and source.count("/") > 1:
        owner, repository, inside["subfolder"] = source.split("/", 2)
        name = f"{owner}/{repository}"
    try:
        loaders = [getattr(transformers, kind).from_pretrained for kind in kinds]
        return [load(name, local_files_only=local, **inside) for load in loaders]
    except Exception as e:  # of whatever class
        raise ValueError(f"--{flag} {source}: {files.first_line(e)}") from None


def _fetch(model: str, revision: str, variant: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    download = partial(snapshot_download, model, revision=revision, cache_dir=cache_dir)
    at = model if revision == "main" else f"{model} at revision {revision}"
    try:
        info = HfApi().model_info(model, revision=revision, timeout=TIMEOUT)
        names = needed([file.rfilename for file in info.siblings or ()], variant, model)
        return _model_in(Path(download(allow_patterns=names)), names)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{model} is gated: accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{model} is neither a path nor a public model on the hub") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{model} has no revision {revision!r} on the hub") from error
    except ValueError:
        raise
    except Exception as error:  # the error for an unreachable hub depends on the library's release
        reason = "the hub is switched off" if constants.HF_HUB_OFFLINE else files.first_line(error)
    try:  # the files that an earlier run has fetched; their names tell which of them are needed
        cached = Path(download(local_files_only=True, allow_patterns=[]))
    except errors.LocalEntryNotFoundError:
        raise ValueError(f"{at} is not in the cache and cannot be fetched ({reason})") from None
    names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    try:
        return _model_in(cached, needed(names, variant, at))
    except ValueError as error:
        raise ValueError(f"{error}, in the cache; and the rest cannot be fetched ({reason})") from error


def needed(names: Collection[str], variant: str | None, model: str) -> list[str]:
    """Return the files that loading reads, of a repository's `names`. ValueError, naming the model, if none.

    In the diffusers layout: the configs, the tokenizer, and one set of weights for each part. For one network
    by itself, such as a ControlNet: its config and one set of weights. Otherwise the only single file.
    """
    top = [name for name in names if "/" not in name]
    folders, fixed = {}, []  # part -> the beginning of its files' names
    if diffusers.INDEX in top and any(name.startswith("text_encoder/") for name in names):
        folders = {part: f"{part}/" for part in PARTS}
        tokenizer = (f"tokenizer/{name}" for name in diffusers.TOKENIZER_FILES)
        fixed = [diffusers.INDEX, diffusers.SCHEDULER, *tokenizer]
    elif diffusers.INDEX in top:  # of pixels; those of 2022 have all files at the top
        folders = {"unet2d": "unet/" if f"unet/{CONFIG}" in names else ""}
        scheduler = diffusers.SCHEDULER if folders["unet2d"] else diffusers.SCHEDULER.rpartition("/")[2]
        fixed = [diffusers.INDEX, scheduler]
    elif CONFIG in top and diffusers.variants(top, "controlnet"):
        folders = {"controlnet": ""}
    if folders:
        inside = {p: [n.removeprefix(f) for n in names if n.startswith(f)] for p, f in folders.items()}
        weights = diffusers.choose(inside, variant, model)
        return fixed + [folders[part] + file for part in folders for file in (CONFIG, *weights[part])]
    for suffixes in (files.SAFETENSORS, files.PICKLES):
        single = sorted(name for name in top if name.endswith(suffixes))
        if len(single) > 1:
            raise ValueError(f"{model} has several single files ({', '.join(single)}); give a path to one")
        if single:
            return single
    raise ValueError(f"{model} has neither {diffusers.INDEX} nor a single file of weights")


def _model_in(folder: Path, names: list[str]) -> Path:
    return folder if {diffusers.INDEX, CONFIG} & {*names} else folder / names[0]
