"""The folder of a run: options, log, trackers, and checkpoints that a run can go on from.

A checkpoint holds the trained tensors, the optimizer's state and a few numbers. There is no random state in
it, because every draw is a function of the seed and the number of its sample (minisd/noise.py).
"""

import json
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minisd import files
from minisd.data import images

# Options that may differ between a run and its continuation.
FREE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps", "num_train_epochs",
    "checkpointing_steps", "checkpoints_total_limit", "save_steps", "report_to", "logging_dir", "local_rank",
    "push_to_hub", "hub_model_id", "hub_token", "cache_dir", "dataloader_num_workers", "cache_latents",
    "kernels", "validation_prompt", "validation_steps", "validation_epochs", "num_validation_images",
    "hub_private_repo", "validation_image", "val_image_url", "save_images_epochs", "save_model_epochs",
    "eval_batch_size", "ddpm_num_inference_steps",
}  # fmt: skip


@dataclass(kw_only=True)
class State:
    """Where a run stands: updates done, samples seen, and the tensors that say the rest."""

    step: int
    samples: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "name.exp_avg" and the like
    scaler: dict


class Run:
    def __init__(self, method: str, options):
        self.folder: Path = options.output_dir
        self.options = options
        self.plain = {"method": method} | {
            k: _plain(v) for k, v in asdict(options).items() if k != "hub_token"
        }
        self.discarded: list[Path] = []
        self.trackers = []

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.folder.glob("checkpoint-*") if p.name[11:].isdigit() and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name[11:]))

    def resume(self) -> State | None:
        """The state to go on from, or None to begin. ValueError if the flags ask for neither clearly."""
        wanted, found = self.options.resume_from_checkpoint, self.checkpoints()
        if wanted is None:
            if found and not self.options.overwrite_output_dir:
                raise ValueError(
                    f"--output_dir {self.folder} has checkpoints of an earlier run, up to {found[-1].name}: "
                    "--resume_from_checkpoint latest goes on with it, --overwrite_output_dir starts over"
                )
            self.discarded = [*found, self.folder / "log.jsonl"]
            return None
        if wanted == "latest":
            if not found:
                print(f"--resume_from_checkpoint latest: none in {self.folder} yet, so this run begins at 0")
                return None
            path = found[-1]
        else:
            path = next((p for p in (Path(wanted), self.folder / Path(wanted).name) if p.is_dir()), None)
            if path is None:
                raise ValueError(f"--resume_from_checkpoint: there is no folder {wanted}")
        state = files.read_json(path / "state.json")
        changed = [k for k, v in state["options"].items() if k not in FREE and self.plain.get(k) != v]
        if changed:
            before = ", ".join(f"--{k} was {state['options'][k]}" for k in changed)
            raise ValueError(f"{path} is of a run with other flags ({before}): give the same, or start over")
        print(f"going on from {path}")
        self._cut_log(state["step"])
        return State(
            step=state["step"],
            samples=state["samples"],
            tensors=files.read(path / "trained.safetensors"),
            optimizer=files.read(path / "optimizer.safetensors"),
            scaler=state["scaler"],
        )

    def save(self, state: State) -> None:
        """Write checkpoint-STEP under another name, then rename it; then drop what is over the limit."""
        with files.new_folder(self.folder / f"checkpoint-{state.step}") as folder:
            files.write(folder / "trained.safetensors", state.tensors)
            files.write(folder / "optimizer.safetensors", state.optimizer)
            numbers = {"step": state.step, "samples": state.samples, "scaler": state.scaler}
            files.write_text(folder / "state.json", json.dumps(numbers | {"options": self.plain}, indent=2))
        limit = self.options.checkpoints_total_limit
        for path in self.checkpoints()[: -limit if limit else 0]:
            shutil.rmtree(path)

    # Log

    def start(self) -> None:
        """Make the folder, leave the options in it and open the trackers."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"--output_dir {self.folder}: {e.strerror}") from None
        for path in [*self.discarded, *files.leftovers(self.folder)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        files.write_text(self.folder / "options.json", json.dumps(self.plain, indent=2) + "\n")
        wanted = self.options.report_to
        for name, tracker in TRACKERS.items():
            if wanted in (name, "all"):
                try:
                    self.trackers.append(tracker(self))
                except ImportError:
                    print(
                        f"--report_to {name}: not installed (pip install 'minisd[track]'); log.jsonl is kept"
                    )
                except Exception as e:  # no login, no network: a tracker is not worth the run
                    print(f"--report_to {name}: {str(e).splitlines()[0]}; log.jsonl is kept")

    def log(self, step: int, **values: float) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def picture(self, step: int, name: str, image: Image.Image, path: str) -> None:
        images.save_png(image, self.folder / path)
        for tracker in self.trackers:
            tracker.picture(step, name, image)

    def _cut_log(self, step: int) -> None:
        """Forget what a killed run logged behind its last checkpoint."""
        path = self.folder / "log.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _plain(value):
    return str(value) if isinstance(value, Path) else value


class TensorBoard:
    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / run.options.logging_dir))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, images.to_tensor(image) / 2 + 0.5, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, run: Run):
        import wandb

        self.wandb = wandb
        project = run.plain.get("tracker_project_name") or f"minisd-{run.plain['method']}"
        self.run = wandb.init(project=project, config=run.plain, dir=str(run.folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


class Interrupt:
    """While it is active, the first SIGINT or SIGTERM only asks to stop; a second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.signal: int | None = None
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this update; once more stops at once", file=sys.stderr)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Hub:
    """Uploads the result; built before training, so that what is missing is said before hours are spent."""

    def __init__(self, options):
        from huggingface_hub import HfApi

        self.folder = options.output_dir
        self.name = options.hub_model_id or Path(options.output_dir).resolve().name
        self.api = HfApi(token=options.hub_token)
        self.ready = False
        try:
            self.name = self.api.create_repo(
                self.name, exist_ok=True, private=options.hub_private_repo or None
            ).repo_id
            self.ready = True
        except Exception as e:  # no token, no network, no permission: each has its own kind
            print(f"--push_to_hub: nothing will be uploaded: {str(e).splitlines()[0]}", file=sys.stderr)

    def push(self) -> None:
        if self.ready:
            self.api.upload_folder(
                repo_id=self.name, folder_path=self.folder, ignore_patterns=["checkpoint-*/*"]
            )
            print(f"uploaded to {self.name}")


def memory() -> str:
    """The most memory that the run has held so far: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}G"
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}G"
