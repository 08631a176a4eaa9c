"""Ids on the hub, against a server on loopback that plays it: what is fetched, kept, and said on failure."""

import base64
import hashlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import pytest
import yaml

from minisd import cli, registry
from minisd.formats import hub as resolver
from minisd.options import TINY, free_flags
from minisd.training import model_card
from tests.conftest import ROOT
from tests.helpers import mostly_slow
from tests.method_helpers import REWARD, train
from tests.test_methods import NEEDS

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
    """The few answers of the hub that fetching and uploading need; `fetched` has the names of the files that
    were given out, and `uploaded` the content of those that came in, by repository and name."""

    def __init__(self):
        self.fetched: list[str] = []
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.asked = 0
        self.broken = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_POST(self):
                hub.take(self)

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

    def take(self, request) -> None:
        sent = request.rfile.read(int(request.headers["Content-Length"]))
        path, status, answer = urlparse(request.path).path, 200, {}
        if self.broken:
            status, answer = 500, {"error": "down"}
        elif path == "/api/repos/create":
            answer = {"url": f"{self.url}/me/{json.loads(sent)['name']}"}
            self.uploaded[answer["url"].removeprefix(f"{self.url}/")] = {}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(sent)["files"]]
            answer["files"] = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
        elif path.endswith("/commit/main"):
            lines = [json.loads(line) for line in sent.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            assert len(added) == len(lines) - 1
            into = self.uploaded[path.removeprefix("/api/models/").removesuffix("/commit/main")]
            into |= {file["path"]: base64.b64decode(file["content"]) for file in added}
            answer = {"success": True, "commitOid": COMMIT["main"], "commitUrl": f"{self.url}/me/x/commit/1"}
        content = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
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


def environment_of(hub: Hub, cache: Path) -> dict[str, str]:
    """Environment variables by which huggingface_hub asks this hub."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    return environment | {f"HF_HUB_DISABLE_{w}": "1" for w in ("TELEMETRY", "XET", "PROGRESS_BARS")}


def resolve(hub: Hub, cache: Path, *asked: tuple[str, dict], offline=False) -> list[tuple[bool, str]]:
    """resolve() in a process of its own, as the hub's address is read at import: (ok, answer) each."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment |= environment_of(hub, cache) | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": str(int(offline))}
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


def test_a_model_that_has_moved(hub, tmp_path, monkeypatch):
    (new,) = resolver.MOVED.values()
    monkeypatch.setitem(REPOSITORIES, new, REPOSITORIES["some/sd"])
    asked = [(old, {}) for old in resolver.MOVED]
    ((ok, path),) = resolve(hub, tmp_path, *asked)
    assert ok and new.replace("/", "--") in path
    assert resolve(hub, tmp_path, *asked, offline=True) == [(ok, path)]
    monkeypatch.delitem(REPOSITORIES, new)
    ((ok, message),) = resolve(hub, tmp_path / "other", *asked)
    assert not ok and message == f"{new} is neither a path nor a public model on the hub"


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


# What a run uploads


def card_of(text: str) -> tuple[dict, str]:
    """The facts in a card's header, and its body."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.fixture
def short(model, cat, script, hub, tmp_path):
    """A run of two updates with an uploaded result."""

    def run(*flags) -> tuple[int, str, str]:
        common = ["--method", "textual_inversion", "--model", model, "--data", cat, "--output_dir"]
        common += [tmp_path / "out", "--placeholder_token", "<my-cat>", "--max_train_steps", 2]
        common += ["--resolution", 32, "--train_batch_size", 1, "--num_validation_images", 1]
        common += ["--push_to_hub", "--hub_token", "hf_secret", "--hub_model_id", "me/cats"]
        environment = environment_of(hub, tmp_path / "cache") | {"no_proxy": "127.0.0.1"}
        return script("train.py", *common, *flags, **environment)

    return run


def test_the_result_its_pictures_and_a_card_are_uploaded_and_nothing_else(short, hub, model, tmp_path):
    out = tmp_path / "out"
    others = {"wandb/run/output.log", "logs/events.out.tfevents.1", "diary.txt"}
    others |= {"validation/mine.png", "validation/step-000009.png"}  # the latter is of an earlier run
    for name in others:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("private")
    flags = ["--validation_prompt", "a {} in snow", "--validation_steps", 1, "--checkpointing_steps", 1]
    status, stdout, stderr = short(*flags, "--save_steps", 1, "--report_to", "none")
    assert status == 0, stderr
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert others | {"options.json", "log.jsonl", "checkpoint-1/state.json"} < there
    result = {"learned_embeds.safetensors", "result.png", "validation/step-000001.png", "README.md"}
    assert set(hub.uploaded) == {"me/cats"} and set(hub.uploaded["me/cats"]) == result
    assert all((out / name).read_bytes() == content for name, content in hub.uploaded["me/cats"].items())
    for content in hub.uploaded["me/cats"].values():
        for private in (str(tmp_path), str(model), str(model.parent), str(ROOT), "hf_secret", "private"):
            assert private.encode() not in content
    assert "uploaded to me/cats" in stdout
    facts, body = card_of(hub.uploaded["me/cats"]["README.md"].decode())
    assert facts["widget"] == [{"text": "a <my-cat> in snow", "output": {"url": "result.png"}}]
    assert "    a <my-cat> in snow\n" in body and "load_textual_inversion('me/cats'" in body


def test_an_upload_that_fails_loses_nothing(short, hub, tmp_path, monkeypatch):
    take = hub.take

    def fail(request):
        hub.broken = request.path.endswith("/commit/main")
        take(request)

    hub.take = fail
    status, stdout, stderr = short("--report_to", "none")
    last = stderr.splitlines()[-1]
    assert status == 2 and last.startswith("train.py: error: --push_to_hub: not uploaded (")
    assert last.endswith(f"the result is in {tmp_path / 'out'}") and "Traceback" not in stderr
    assert (tmp_path / "out/learned_embeds.safetensors").is_file() and hub.uploaded == {"me/cats": {}}


# The model card


@pytest.mark.parametrize(
    "method", mostly_slow(registry.names("methods"), "custom_diffusion", "lora", "unconditional")
)
def test_the_card_says_how_to_load_the_result(method, short_run, model, tmp_path, monkeypatch):
    """Its Python is run against diffusers, and its command is one of ours."""
    o = short_run(method, *NEEDS.get(method, []), max_train_steps=1)
    if hasattr(o, "no_safe_serialization"):
        o.no_safe_serialization = True  # which diffusers needs for Custom Diffusion
    assert train(method, o) == 0
    text = (o.output_dir / "README.md").read_text()
    assert str(tmp_path) not in text and str(model.parent) not in text
    facts, body = card_of(text)
    assert facts["tags"][:2] == ["diffusers", "minisd"] and facts["pipeline_tag"] in text
    assert facts.get("instance_prompt") == getattr(o, "instance_prompt", None)
    assert ("license" in facts) == ("There is no base model" not in body) == (method != "unconditional")
    assert "base_model" not in facts and "result.png" in body

    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for named in (model, Path(REWARD)):  # the card has last names alone
        (tmp_path / named.name).symlink_to(named)
    loaded = {}
    exec(code, loaded)
    assert loaded["pipe"].unet is not None
    for token in {"<new1>", "<cat>"} & set(re.findall(r"<\w+>", code + " ".join(facts.get("tags", [])))):
        assert token in loaded["pipe"].tokenizer.get_vocab()
    command = re.search(r"    python train.py (.*)\n", body)[1]
    given = cli.parse_train(shlex.split(command))[1]
    different = {f.name for f in fields(given) if getattr(given, f.name) != getattr(o, f.name)}
    free = free_flags(type(o)) | {"model", "data", "model_config_name_or_path", "class_data_dir", "reward"}
    assert different <= free, different


def test_a_card_that_is_not_ours_stays(short_run, capsys):
    o = short_run("textual_inversion", max_train_steps=1)
    card = o.output_dir / "README.md"
    assert train("textual_inversion", o) == 0
    first = card.read_text()
    o.seed, o.overwrite_output_dir = 1, True
    assert train("textual_inversion", o) == 0
    assert card.read_text() != first  # it was ours, so it is that of the new run
    for text in (first.replace("minisd", "Minisd"), "# My notes\n", ""):
        card.write_text(text)
        capsys.readouterr()
        assert train("textual_inversion", o) == 0
        assert card.read_text() == text and "README.md is not minisd's" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, base, licence",
    [("org/name", "org/name", "creativeml-openrail-m"), (str(TINY), None, "apache-2.0"),
     ("~/models/sd.ckpt", None, "creativeml-openrail-m")],
)  # fmt: skip
def test_the_base_model_in_the_card(short_run, model, base, licence):
    o = short_run("lora", "--instance_prompt", 'say "x"\n\u2028: {y}', "--init_lora", "x")
    method = SimpleNamespace(validation_prompts=[(o.instance_prompt, None)])
    trainer = SimpleNamespace(options=replace(o, model=model), method=method, step=3, images_per_update=4)
    folder = SimpleNamespace(path=o.output_dir, recorded={"method": "lora"})
    facts, body = card_of(model_card.text(trainer, folder, [], "me/lora"))
    assert (facts.get("base_model"), facts["license"]) == (base, licence)
    assert facts["instance_prompt"] == 'say "x"\n\u2028: {y}' and '\n    say "x" : {y}\n' in body
    assert "models" not in body
