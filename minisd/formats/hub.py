"""From what the user calls a model to a path: a path itself, or an id on the hub, fetched and cached."""

import re
from collections.abc import Collection
from pathlib import Path

from minisd import files
from minisd.formats import diffusers
from minisd.formats.parts import PARTS

PART = "config.json"  # at the top of a repository that holds one part
TIMEOUT = 10  # seconds, until the cache is used instead


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The path of a folder or file to read: `model` itself if it is there, else `org/name` from the hub.

    Only what loading needs is fetched, and only once; without a network the cache alone is used. ValueError,
    naming the model, if there is no such path, id or revision, or if it may not be fetched.
    """
    if not str(model):
        raise ValueError("no model was named")
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and ".." not in name
    if not is_id or path.suffix in (files.SAFETENSORS, *files.PICKLES):
        hint = "" if "/" in name else "; an id on the hub has the form org/name"
        raise ValueError(f"{name} does not exist{hint}")
    return _fetch(name, revision or "main", variant, cache_dir)


def _fetch(model: str, revision: str, variant: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    at = model if revision == "main" else f"{model} at revision {revision}"
    try:
        info = HfApi().model_info(model, revision=revision, timeout=TIMEOUT)
        wanted = needed([file.rfilename for file in info.siblings or ()], variant, model)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, cache_dir=cache_dir))
        return _model_in(folder, wanted)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{model} is gated: accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{model} is neither a path nor a public model on the hub") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{model} has no revision {revision!r} on the hub") from error
    except (errors.HFValidationError, errors.BadRequestError) as error:
        raise ValueError(f"{at} cannot be fetched: {_short(error)}") from error
    except ValueError:
        raise
    except Exception as error:  # what an unreachable hub raises depends on the library's release
        reason = "the hub is switched off" if constants.HF_HUB_OFFLINE else _short(error)
        return _cached(cache, revision, variant, at, reason)


def _cached(cache: Path, revision: str, variant: str | None, at: str, reason: str) -> Path:
    """What an earlier run has fetched. ValueError if that is not all that loading needs."""
    reference = cache / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = cache / "snapshots" / commit
    if not folder.is_dir():
        raise ValueError(f"{at} is not in the cache and cannot be fetched ({reason})")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    try:
        return _model_in(folder, needed(names, variant, at))
    except ValueError as error:
        raise ValueError(f"{error}, in the cache; and the rest cannot be fetched ({reason})") from error


def needed(names: Collection[str], variant: str | None, model: str) -> list[str]:
    """The files, among a repository's, that loading reads. ValueError, naming the model, if it has none.

    A repository in the layout of diffusers: the configs, the tokenizer, and one set of weights for each part.
    One part by itself, such as a ControlNet: its config and one set of weights. Any other: its only single
    file.
    """
    if diffusers.INDEX not in names:
        roots = [name for name in names if "/" not in name]
        if PART in names and diffusers.variants(roots, "controlnet"):
            chosen, shards = diffusers.choose(roots, "controlnet", variant, model)
            return [PART, chosen, *shards]
        for is_weights in (lambda n: n.endswith(files.SAFETENSORS), lambda n: n.endswith(files.PICKLES)):
            if found := sorted(filter(is_weights, roots)):
                if len(found) > 1:
                    raise ValueError(
                        f"{model} has several single files ({', '.join(found)}); give a path to one"
                    )
                return found
        raise ValueError(f"{model} has neither {diffusers.INDEX} nor a single file of weights")

    def inside(part: str) -> list[str]:
        return [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]

    wanted = [diffusers.INDEX, diffusers.SCHEDULER]
    wanted += [f"tokenizer/{name}" for name in inside("tokenizer") if name in diffusers.TOKENIZER_FILES]
    asked = diffusers.variant_of_parts({part: inside(part) for part in PARTS}, variant, model)
    for part in PARTS:
        chosen, shards = diffusers.choose(inside(part), part, asked[part], f"{model}/{part}")
        wanted += [f"{part}/{name}" for name in ("config.json", chosen, *shards)]
    return [name for name in wanted if name in names]


def _model_in(folder: Path, wanted: list[str]) -> Path:
    return folder if {diffusers.INDEX, PART} & {*wanted} else folder / wanted[0]


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
