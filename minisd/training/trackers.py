"""Copies of a run's curves, images and result elsewhere: tensorboard, wandb and the hub."""

import sys

from PIL import Image

from minisd import files, reading
from minisd.data import images
from minisd.options import Run
from minisd.spelling import as_written


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
    """The trackers of --report_to. One that fails to start is reported in a line and left out."""
    trackers = []
    for name, tracker in TRACKERS.items():
        if options.report_to in (name, "all"):
            try:
                trackers.append(tracker(options, recorded))
            except ImportError:
                _say(name, "not installed (pip install 'minisd[track]')")
            except Exception as e:  # no login, no network: each library has its own errors
                _say(name, str(e).splitlines()[0])
    if options.report_to == "comet_ml":
        _say("comet_ml", "minisd does not log there")
    return trackers


def _say(name: str, reason: str) -> None:
    print(as_written(f"--report_to {name}: {reason}; log.jsonl is kept"))


def create_repository(options: Run) -> str | None:
    """Create the repository of --push_to_hub, before training, so that a problem is reported before hours are
    spent. Returns its id, or None if there is such a problem, or no --push_to_hub."""
    if not options.push_to_hub:
        return None
    from huggingface_hub import HfApi

    name, private = options.hub_model_id or reading.real(options.output_dir).name, options.hub_private_repo
    api = HfApi(token=options.hub_token)
    try:
        return api.create_repo(name, exist_ok=True, private=private or None).repo_id
    except Exception as e:  # no token, no network, no permission: each has its own error
        print(f"--push_to_hub: nothing will be uploaded: {str(e).splitlines()[0]}", file=sys.stderr)
        return None


def upload(options: Run, repository: str, names: list[str]) -> None:
    """Upload these files of the run's folder, and nothing else. ValueError if the hub does not take them."""
    from huggingface_hub import CommitOperationAdd, HfApi

    added = [CommitOperationAdd(name, options.output_dir / name) for name in names]
    try:
        HfApi(token=options.hub_token).create_commit(repository, added, commit_message="End of training")
    except Exception as e:  # each problem has its own error
        folder, reason = options.output_dir, files.first_line(e)
        raise ValueError(f"--push_to_hub: not uploaded ({reason}); the result is in {folder}") from e
    print(f"uploaded to {repository}: {', '.join(names)}")
