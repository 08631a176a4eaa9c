"""Ids on the hub, against a server on loopback that plays it: what is fetched, kept, and said when it fails."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMIT = {"main": "a" * 40, "v2": "b" * 40}

SD = [
    "model_index.json", "README.md", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt",
    "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json", "safety_checker/config.json", "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/config.json",
    "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors",
]  # fmt: skip
NEEDED = {
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json", "unet/config.json", "vae/config.json",
    "text_encoder/config.json",
}  # fmt: skip
PLAIN = {
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
}  # fmt: skip

SHARD = "unet/diffusion_pytorch_model-0000{}-of-00002.safetensors"
SHARDED = [name for name in SD if not name.startswith("unet/")] + [
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json",
    SHARD.format(1), SHARD.format(2), "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
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
            return as_json([
                {"type": "file", "path": name, "size": len(name), "oid": hashlib.sha1(name.encode()).hexdigest()}
                for name in files
            ])  # fmt: skip
        if api:
            return as_json({"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        name = "/".join(words[2:])
        if words[:1] != ["resolve"] or name not in files:
            return wrong("EntryNotFound")
        etag = f'"{hashlib.sha1(name.encode()).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit, "X-File": name}, name.encode()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def resolve(hub: Hub, cache: Path, model: str, **kwargs) -> tuple[bool, str]:
    """resolve() in a process of its own, since the hub's address is read at import: (whether ok, answer)."""
    offline = kwargs.pop("offline", False)
    code = (
        "import sys, json\n"
        "from minisd.weights import hub\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "model, kwargs = json.loads(sys.argv[1])\n"
        "try:\n    print('path', hub.resolve(model, **kwargs))\n"
        "except ValueError as error:\n    print('error', error)\n"
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    } | ({"HF_HUB_OFFLINE": "1"} if offline else {})  # fmt: skip
    command = [sys.executable, "-c", code, json.dumps([model, kwargs])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kind, _, answer = done.stdout.rstrip("\n").partition(" ")
    assert "\n" not in answer
    return kind == "path", answer


def names(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_is_fetched_once_and_then_read_offline(hub, tmp_path):
    ok, path = resolve(hub, tmp_path, "some/sd")
    assert ok, path
    assert names(path) == NEEDED | PLAIN == set(hub.fetched) and len(hub.fetched) == len(NEEDED | PLAIN)
    assert (Path(path) / "unet/config.json").read_text() == "unet/config.json"
    assert resolve(hub, tmp_path, "some/sd") == (True, path)
    asked = hub.asked
    assert resolve(hub, tmp_path, "some/sd", offline=True) == (True, path)
    assert hub.asked == asked and len(hub.fetched) == len(NEEDED | PLAIN)
    hub.server.shutdown()
    hub.server.server_close()
    assert resolve(hub, tmp_path, "some/sd") == (True, path)
    # What is not in the cache is missing, in one line.
    ok, line = resolve(hub, tmp_path, "some/binary")
    assert not ok and line.startswith("some/binary is not in the cache and cannot be fetched (")
    ok, line = resolve(hub, tmp_path, "some/sd", variant="fp16", offline=True)
    assert not ok and line.startswith("some/sd has no variant 'fp16'") and "in the cache" in line
    ok, line = resolve(hub, tmp_path, "some/sd", revision="v2", offline=True)
    assert not ok and line.startswith("some/sd at revision v2 is not in the cache") and "switched off" in line


@pytest.mark.parametrize(
    "model, kwargs, weights",
    [
        ("some/sd", {"variant": "fp16"}, {name.replace(".safetensors", ".fp16.safetensors") for name in PLAIN}),
        (
            "some/sd", {"variant": "non_ema", "revision": "v2"},
            PLAIN - {"unet/diffusion_pytorch_model.safetensors"} | {"unet/diffusion_pytorch_model.non_ema.safetensors"},
        ),
        (
            "some/sharded", {},
            PLAIN - {"unet/diffusion_pytorch_model.safetensors"}
            | {"unet/diffusion_pytorch_model.safetensors.index.json", SHARD.format(1), SHARD.format(2)},
        ),
        (
            "some/binary", {},
            {"unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"},
        ),
    ],
)  # fmt: skip
def test_only_what_loading_needs(hub, tmp_path, model, kwargs, weights):
    ok, path = resolve(hub, tmp_path, model, **kwargs)
    assert ok, path
    assert Path(path).name == COMMIT[kwargs.get("revision", "main")]
    assert names(path) == NEEDED | weights == set(hub.fetched)


@pytest.mark.parametrize(
    "model, name", [("some/single.v1.5", "model.safetensors"), ("some/ckpt", "model.ckpt")]
)
def test_a_single_file(hub, tmp_path, model, name):
    ok, path = resolve(hub, tmp_path, model)
    assert ok and Path(path).name == name and hub.fetched == [name]
    assert resolve(hub, tmp_path, model, offline=True) == (True, path)
    hub.broken = True
    assert resolve(hub, tmp_path, model) == (True, path)


def test_a_cache_of_ones_own(hub, tmp_path):
    ok, path = resolve(hub, tmp_path / "home", "some/ckpt", cache_dir=str(tmp_path / "own"))
    assert ok and path.startswith(str(tmp_path / "own"))
    again = resolve(hub, tmp_path / "home", "some/ckpt", cache_dir=str(tmp_path / "own"), offline=True)
    assert again == (True, path)


@pytest.mark.parametrize(
    "model, kwargs, expected",
    [
        ("some/unknown", {}, "some/unknown is neither a path nor a public model"),
        ("some/gated", {}, "some/gated is gated: accept its terms"),
        ("some/sd", {"revision": "nope"}, "some/sd has no revision 'nope'"),
        (
            "some/sd",
            {"variant": "bf16"},
            "some/sd has no variant 'bf16'; there are fp16, non_ema, plain weights",
        ),
        ("some/several", {}, "some/several has several single files (a.safetensors, b.safetensors)"),
        ("some/nothing", {}, "some/nothing has neither model_index.json nor a single file"),
        (
            "some/sd",
            {"offline": True},
            "some/sd is not in the cache and cannot be fetched (the hub is switched",
        ),
    ],
)
def test_what_goes_wrong_is_one_line(hub, tmp_path, model, kwargs, expected):
    ok, line = resolve(hub, tmp_path, model, **kwargs)
    assert not ok and line.startswith(expected)
    assert not hub.fetched


@pytest.mark.parametrize(
    "model", ["./nope", "/nope/model", "~/nope", "../a/b", "nope.safetensors", "org/nope.ckpt", "a/b/c", "nope",
              "some/sd/", "a b/c", "some/..", "C:\\models\\sd"]
)  # fmt: skip
def test_what_looks_like_a_path_never_asks_the_hub(hub, tmp_path, model):
    ok, line = resolve(hub, tmp_path, model)
    assert not ok and line.startswith(f"{model} does not exist") and hub.asked == 0


def test_existing_paths(tmp_path, monkeypatch):
    from minisd.weights import hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/sd").mkdir(parents=True)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("some/sd") == Path("some/sd")
    assert hub.resolve(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"
    assert hub.resolve("~/x.safetensors") == tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no model was named"):
        hub.resolve("")
