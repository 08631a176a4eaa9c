"""What the judge says of diffusers' scripts, beside what it says of train.py.

    git clone https://github.com/huggingface/diffusers
    python tests/judge_scripts.py --scripts diffusers/examples [METHOD ...]
    python tests/judge_scripts.py --scripts diffusers/examples --unseen --seeds 0 1 2 [METHOD ...]
    python tests/judge_scripts.py --scripts diffusers/examples --clock [METHOD ...]

Each script trains the tiny model on the same pictures with the same flags, so far as it has them, and what it
leaves is read and drawn from here. train.py trains with several seeds, which shows how much chance there is
in a figure. What the scripts have no flag for stands in `scripted`.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minisd import cli  # noqa: E402
from minisd.options import TINY  # noqa: E402
from minisd.sampling.stable_diffusion import StableDiffusion  # noqa: E402
from minisd.tiny import clock, judge, trial, unseen  # noqa: E402
from minisd.tiny.concepts import UNSEEN  # noqa: E402
from tests.cost_methods import METHODS  # noqa: E402

LORA_AS_DREAMBOOTH = "dreambooth/train_dreambooth_lora.py"
OURS = "report_to", "num_validation_images", "validation_prompt", "checkpointing_steps", "save_model_epochs"


def pictures_alone(folder: Path) -> Path:
    """A copy without the captions."""
    copy = folder.with_name(f"{folder.name}-pictures")
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.jsonl"), dirs_exist_ok=True))


def in_fp32(t: trial.Trial) -> Path:
    """The model with fp32 weights: transformers trains a text encoder in the precision that its file has."""
    StableDiffusion.load(t.path, dtype=torch.float32).save(t.folder / "model")
    return t.folder / "model"


def control_net(t: trial.Trial) -> Path:
    """A new ControlNet for the tiny model: the script can make none for a VAE that divides by 4."""
    from minisd.formats import diffusers
    from minisd.models.controlnet import ControlNet

    sd = t.load()
    torch.manual_seed(0)
    diffusers.save_part(t.folder / "new", ControlNet.from_unet(sd.unet, sd.vae.config.downscale))
    return t.folder / "new"


class Uncaptioned(trial.Trial):
    """A trial in which train.py, too, gets a concept's pictures alone."""

    def concept(self, thing: trial.Thing, word: str) -> Path:
        return pictures_alone(super().concept(thing, word))


class Scripted(trial.Trial):
    """A trial in which a script trains."""

    scripts: Path

    def train(self, **flags) -> Path:
        out, method = self.folder / "result", self.method
        as_dreambooth = method == "lora" and "instance_prompt" in flags
        script = self.scripts / (LORA_AS_DREAMBOOTH if as_dreambooth else METHODS[method][0])
        known = set(re.findall(r'"--(\w+)"', script.read_text()))
        flags = {k: v for k, v in (trial.defaults().get(method, {}) | flags).items() if k not in OURS}
        flags |= {"output_dir": out, "checkpointing_steps": 10**6, "seed": 0}
        flags |= self.scripted(flags)
        command = [sys.executable, str(script.resolve())]
        for name, value in flags.items():
            if name in known and value is not False:
                command += [f"--{name}"] if value is True else [f"--{name}={value}"]
        started = time.monotonic()
        with (self.folder / "train.log").open("w") as log:
            env = os.environ | {"HF_HUB_OFFLINE": "1"}
            status = subprocess.run(command, stdout=log, stderr=log, cwd=self.folder, env=env).returncode
        if status:
            raise SystemExit(f"{method}: see {log.name}")
        self.training += time.monotonic() - started
        return out

    def scripted(self, flags: dict) -> dict:
        """The flags that the script names otherwise, or needs besides."""
        method, data, of_subject = self.method, flags.get("data"), "instance_prompt" in flags
        if data and (of_subject or method == "textual_inversion"):  # they open every file of a folder
            data = pictures_alone(data)
        changed = {
            "pretrained_model_name_or_path": in_fp32(self) if "model" in flags else None,
            "instance_data_dir" if of_subject else "train_data_dir": data,
        }
        if "class_data_dir" in flags:
            changed["class_data_dir"] = pictures_alone(flags["class_data_dir"])
        if "concepts_list" in flags:
            concepts = json.loads(Path(flags["concepts_list"]).read_text())
            for concept in concepts:
                for key in ("instance_data_dir", "class_data_dir"):
                    concept[key] = str(pictures_alone(Path(concept[key])))
            Path(flags["concepts_list"]).write_text(json.dumps(concepts))
        if method == "controlnet":
            changed["controlnet_model_name_or_path"] = control_net(self)
        if method == "unconditional":  # it counts in epochs, and knows no --snr_gamma
            count, batch = len(list(data.glob("*.png"))), flags["train_batch_size"]
            changed["num_epochs"] = math.ceil(flags["max_train_steps"] / math.ceil(count / batch))
            changed["save_model_epochs"] = changed["num_epochs"]
        return {k: v.resolve() if isinstance(v, Path) else v for k, v in changed.items() if v is not None}


def compare_unseen(methods: list[str], concepts: list[str], seeds: list[int], out: Path) -> None:
    """Print the shares of images that show a thing, on white and on blue, of a script and of train.py."""
    print(f"| method | thing | script | {' | '.join(f'seed {s}' for s in seeds)} |")
    print("|---" * (3 + len(seeds)) + "|", flush=True)
    for method in methods:
        for name in concepts:
            rows = [unseen.run(method, name, 0, TINY, (out / "unseen-script").resolve(), [], Scripted)]
            rows += [unseen.run(method, name, seed, TINY, out / "unseen", []) for seed in seeds]
            shares = " | ".join(f"{row['on white']:.2g}; {row['on blue']:.2g}" for row in rows)
            print(f"| `{method}` | {name} | {shares} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(judge.TRIALS))
    parser.add_argument("--scripts", type=Path, required=True, help="the folder examples of diffusers")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="of train.py's runs")
    parser.add_argument(
        "--no_captions", action="store_true", help="of concepts, which three of the scripts cannot read"
    )
    parser.add_argument("--unseen", action="store_true", help="personalisation on what the model never saw")
    parser.add_argument("--clock", action="store_true", help="quality over seconds of both, as a picture")
    parser.add_argument("--concept", action="append", choices=UNSEEN, help="with --unseen: this thing")
    parser.add_argument("--out", type=Path, default=Path("judged-scripts"))
    o = parser.parse_args()
    Scripted.scripts = o.scripts
    if o.unseen:
        compare_unseen(o.methods or list(unseen.TRAINERS), o.concept or list(UNSEEN), o.seeds, o.out)
        return 0
    if o.clock:
        kinds = {"train.py": trial.Trial, "script": Scripted}
        clock.measure(
            judge.TRIALS, o.methods or [m for m in METHODS if m in judge.TRIALS], kinds, TINY, o.out, []
        )
        return 0
    print(f"| method | measure | before | needed | script | {' | '.join(f'seed {s}' for s in o.seeds)} |")
    print("|---" * (5 + len(o.seeds)) + "|", flush=True)
    for method in o.methods or [m for m in judge.TRIALS if METHODS.get(m, ("",))[0]]:
        with contextlib.redirect_stdout(sys.stderr):
            judge.Trial = Uncaptioned if o.no_captions else trial.Trial
            runs = [
                judge.judge(method, TINY, o.out / f"seed-{seed}", ["--seed", str(seed)]) for seed in o.seeds
            ]
            judge.Trial = Scripted
            theirs = judge.judge(method, TINY, (o.out / "script").resolve(), [])
        for m, *seeds in zip(theirs, *runs, strict=True):
            after = " | ".join(f"{s.after:.3g}" for s in seeds)
            need = f"{'>=' if m.more else '<='} {m.need:.3g}"
            print(f"| {method} | {m.name} | {m.before:.3g} | {need} | {m.after:.3g} | {after} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run("judge_scripts", main)
