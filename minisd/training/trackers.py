"""Where curves, images and the result go besides the run's folder: tensorboard, wandb and the hub."""

import sys
from pathlib import Path

from PIL import Image

from minisd.data import images
from minisd.options import Run


class TensorBoard:
    def __init__(self, options: Run, recorded: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(options.output_dir / options.logging_dir))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, images.to_tensor(image) / 2 + 0.5, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, options: Run, recorded: dict):
        import wandb

        self.wandb = wandb
        project = recorded.get("tracker_project_name") or f"minisd-{recorded['method']}"
        self.run = wandb.init(project=project, config=recorded, dir=str(options.output_dir))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def start(options: Run, recorded: dict) -> list[TensorBoard | WandB]:
    """The trackers of --report_to. One that cannot be had is named and left out: it is not worth the run."""
    trackers = []
    for name, tracker in TRACKERS.items():
        if options.report_to in (name, "all"):
            try:
                trackers.append(tracker(options, recorded))
            except ImportError:
                print(f"--report_to {name}: not installed (pip install 'minisd[track]'); log.jsonl is kept")
            except Exception as e:  # no login, no network: each library has its own errors
                print(f"--report_to {name}: {str(e).splitlines()[0]}; log.jsonl is kept")
    return trackers


class Hub:
    """Uploads the result. Made before training, so that a problem is reported before hours are spent."""

    def __init__(self, options: Run):
        from huggingface_hub import HfApi

        self.folder = options.output_dir
        self.name = options.hub_model_id or Path(options.output_dir).resolve().name
        self.api = HfApi(token=options.hub_token)
        self.ready = False
        try:
            private = options.hub_private_repo or None
            self.name = self.api.create_repo(self.name, exist_ok=True, private=private).repo_id
            self.ready = True
        except Exception as e:  # no token, no network, no permission: each has its own kind
            print(f"--push_to_hub: nothing will be uploaded: {str(e).splitlines()[0]}", file=sys.stderr)

    def push(self) -> None:
        """Upload the folder, but for its checkpoints."""
        if self.ready:
            ignored = ["checkpoint-*/*"]
            self.api.upload_folder(repo_id=self.name, folder_path=self.folder, ignore_patterns=ignored)
            print(f"uploaded to {self.name}")
