"""Ids on the hub, against a server on loopback that plays it: what is fetched, kept, and said on failure."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from minisd.formats import hub as resolver
from tests.conftest import ROOT

COMMIT = {"main": "a" * 40, "v2": "b" * 40}

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
NEEDED = {
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json", "unet/config.json",
    "vae/config.json", "text_encoder/config.json",
}  # fmt: skip
PLAIN = {f"{stem}.safetensors" for stem in (UNET, VAE, TEXT)}
HALF = {f"{stem}.fp16.safetensors" for stem in (UNET, VAE, TEXT)}
PICKLES = {f"{UNET}.bin", f"{VAE}.bin", "text_encoder/pytorch_model.bin"}
SD = [
    *NEEDED, *PLAIN, *HALF, *PICKLES, f"{UNET}.non_ema.safetensors", "README.md", "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt", "feature_extractor/preprocessor_config.json", "safety_checker/config.json",
    "safety_checker/model.safetensors", "safety_checker/pytorch_model.bin",
]  # fmt: skip

SHARDS = {f"{UNET}.safetensors.index.json", *(f"{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2))}
SHARDED = [name for name in SD if not name.startswith(UNET)] + [
    *SHARDS, f"{UNET}.fp16-00001-of-00002.safetensors",
]  # fmt: skip
REPOSITORIES = {
    "some/sd": SD,
    "some/sharded": SHARDED,
    "some/binary": [name for name in SD if not name.endswith(".safetensors")],
    "some/single.v1.5": ["README.md", "model.safetensors", "model.ckpt"],
    "some/ckpt": ["model.ckpt"],
    "some/several": ["a.safetensors", "b.safetensors"],
    "some/nothing": ["README.md"],
}


def digest(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class Hub:
    """The few answers of the hub that fetching needs; `fetched` counts the files that were given out."""

    def __init__(self):
        self.fetched: list[str] = []
        self.asked = 0
        self.broken = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request, body: bool) -> None:
        self.asked += 1
        status, headers, content = self.content(unquote(urlparse(request.path).path))
        if body and status == 200 and "X-Repo-Commit" in headers:
            self.fetched.append(headers.pop("X-File"))
        headers.pop("X-File", None)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def content(self, path: str) -> tuple[int, dict[str, str], bytes]:
        def as_json(value, status=200, **headers):
            return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()

        def wrong(code, status=404):
            return as_json({"error": code}, status, **{"X-Error-Code": code, "X-Error-Message": code})

        if self.broken:
            return as_json({"error": "down"}, 500)
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        model, words = "/".join(words[:2]), words[2:]
        if model == "some/gated":
            return wrong("GatedRepo", 403)
        if model not in REPOSITORIES:
            return wrong("RepoNotFound", 401)
        files = REPOSITORIES[model]
        revision = words[1] if len(words) > 1 else "main"
        commit = COMMIT.get(revision, revision if revision in COMMIT.values() else None)
        if commit is None:
            return wrong("RevisionNotFound")
        if api and words[:1] == ["tree"]:
            return as_json(
                [{"type": "file", "path": name, "size": len(name), "oid": digest(name)} for name in files]
            )
        if api:
            return as_json({"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        name = "/".join(words[2:])
        if words[:1] != ["resolve"] or name not in files:
            return wrong("EntryNotFound")
        return 200, {"ETag": f'"{digest(name)}"', "X-Repo-Commit": commit, "X-File": name}, name.encode()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


CHILD = """
import json, sys
from minisd.formats import hub
assert "huggingface_hub" not in sys.modules
for model, kwargs in json.loads(sys.argv[1]):
    try:
        print(json.dumps([True, str(hub.resolve(model, **kwargs))]))
    except ValueError as error:
        print(json.dumps([False, str(error)]))
"""


def resolve(hub: Hub, cache: Path, *asked: tuple[str, dict], offline=False) -> list[tuple[bool, str]]:
    """resolve() in a process of its own, as the hub's address is read at import: (ok, answer) each."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    environment |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("TELEMETRY", "XET", "PROGRESS_BARS")}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked) and not any("\n" in answer for _, answer in answers)
    return answers


def names(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_what_is_fetched_once_is_then_read_offline(hub, tmp_path):
    asked = [("some/sd", {}), ("some/single.v1.5", {}), ("some/ckpt", {"cache_dir": str(tmp_path / "own")})]
    fetched = resolve(hub, tmp_path, *asked, *asked)
    assert all(ok for ok, _ in fetched) and fetched[:3] == fetched[3:], fetched
    folder, single, ckpt = (Path(path) for _, path in fetched[:3])
    assert hub.fetched[-2:] == [single.name, ckpt.name] == ["model.safetensors", "model.ckpt"]
    assert [tmp_path / "own" in path.parents for path in (folder, single, ckpt)] == [False, False, True]
    assert (
        names(folder) == NEEDED | PLAIN == set(hub.fetched[:-2])
        and len(hub.fetched) == len(NEEDED | PLAIN) + 2
    )
    assert (folder / "unet/config.json").read_text() == "unet/config.json"
    requests = hub.asked
    answers = resolve(
        hub, tmp_path, *asked, ("some/sd", {"variant": "fp16"}), ("some/sd", {"revision": "v2"}),
        ("some/ckpt", {}), offline=True,
    )  # fmt: skip
    assert answers[:3] == fetched[:3] and [ok for ok, _ in answers[3:]] == [False] * 3
    assert answers[3][1].startswith("some/sd has no variant 'fp16'") and "in the cache" in answers[3][1]
    assert answers[4][1].startswith("some/sd at revision v2 is not in the cache and cannot be fetched (")
    assert answers[5][1] == "some/ckpt is not in the cache and cannot be fetched (the hub is switched off)"
    assert hub.asked == requests
    hub.broken = True  # it is there, but answers with an error
    assert resolve(hub, tmp_path, *asked) == fetched[:3]
    hub.server.shutdown()
    hub.server.server_close()
    answers = resolve(hub, tmp_path, *asked, ("some/binary", {}))
    assert answers[:3] == fetched[:3]
    assert answers[3][1].startswith("some/binary is not in the cache and cannot be fetched (")


def test_only_what_loading_needs(hub, tmp_path):
    rest = PLAIN - {f"{UNET}.safetensors"}
    expected = [
        ("some/sd", {"variant": "fp16"}, HALF),
        ("some/sd", {"variant": "non_ema", "revision": "v2"}, rest | {f"{UNET}.non_ema.safetensors"}),
        ("some/sharded", {}, rest | SHARDS),
        ("some/binary", {}, PICKLES),
    ]
    caches = ({"cache_dir": str(tmp_path / str(i))} for i in range(4))  # none has what another has fetched
    asked = [(model, kwargs | cache) for (model, kwargs, _), cache in zip(expected, caches, strict=True)]
    answers = resolve(hub, tmp_path, *asked)
    fetched = iter(hub.fetched)
    for (ok, path), (_, kwargs, weights) in zip(answers, expected, strict=True):
        assert ok, path
        assert Path(path).name == COMMIT[kwargs.get("revision", "main")]
        needed = NEEDED | weights
        assert names(path) == needed == set(itertools.islice(fetched, len(needed)))
    assert not list(fetched)


def test_what_goes_wrong_is_one_line(hub, tmp_path):
    expected = {
        ("some/unknown",): "some/unknown is neither a path nor a public model",
        ("some/gated",): "some/gated is gated: accept its terms",
        ("some/sd", "revision", "nope"): "some/sd has no revision 'nope'",
        (
            "some/sd",
            "variant",
            "bf16",
        ): "some/sd has no variant 'bf16'; there are fp16, non_ema, plain weights",
        ("some/several",): "some/several has several single files (a.safetensors, b.safetensors)",
        ("some/nothing",): "some/nothing has neither model_index.json nor a single file",
    }
    answers = resolve(hub, tmp_path, *((model, dict([words] if words else [])) for model, *words in expected))
    for (ok, line), start in zip(answers, expected.values(), strict=True):
        assert not ok and line.startswith(start)
    assert not hub.fetched


@pytest.mark.parametrize(
    "model", ["./nope", "/nope/model", "~/nope", "../a/b", "nope.safetensors", "org/nope.ckpt", "a/b/c",
              "nope", "some/sd/", "a b/c", "some/..", "C:\\models\\sd"]
)  # fmt: skip
def test_what_looks_like_a_path_never_asks_the_hub(monkeypatch, model):
    monkeypatch.setattr(resolver, "_fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"^{re.escape(model)} does not exist"):
        resolver.resolve(model)


def test_existing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/sd").mkdir(parents=True)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolver.resolve("some/sd") == Path("some/sd")
    assert resolver.resolve(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"
    assert resolver.resolve("~/x.safetensors") == tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no model was named"):
        resolver.resolve("")
