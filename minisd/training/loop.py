"""The training loop, the same for every method."""

import signal
import sys
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from minisd.data.order import Stream, batches
from minisd.methods._base import Method
from minisd.options import Training
from minisd.training import checkpoint, trackers
from minisd.training.distributed import Processes
from minisd.training.run_folder import Log, RunFolder
from minisd.training.step import Trainer
from minisd.training.validation import validate


def train(method: Method, folder: RunFolder) -> int:
    """Train until the options' last update. Returns the exit status: 0, or 128 + the signal that ended it.

    Everything is counted in optimizer updates: steps, learning rate, checkpoints, validation.
    """
    options, processes = method.options, Processes()

    # Start
    earlier = folder.checkpoints.resume()  # first, so that wrong flags are reported before a model is loaded
    torch.manual_seed(options.seed)
    if processes.first:
        method.prepare()
    processes.wait()
    trained = method.setup()
    dataset, held_out = method.datasets()
    trainer = Trainer(method, trained, len(dataset), processes)
    if earlier:
        checkpoint.restore(trainer, earlier)
    repository = None
    if options.push_to_hub and processes.first:
        repository = trackers.create_repository(options)
    if processes.first:
        folder.start(trainer.step)
        print(describe(trainer, held_out))
    source = micro_batches(trainer, dataset)

    # Updates
    log, stop = Log(folder, trainer.step, trainer.total, show=processes.first), 0
    with Interrupt() as interrupt, log.bar:
        while trainer.step < trainer.total and not stop:
            update = trainer.update(source)
            if processes.first:
                log.add(trainer.step, *update)
                after_update(trainer, held_out, folder, log)
            stop = processes.agree(interrupt.signal or 0)  # the signal that asked to stop
            if stop or is_due(trainer.step, options.checkpointing_steps):
                log.flush()
                if processes.first:
                    folder.checkpoints.save(trainer)
                processes.wait()

    # End
    stopped = stop and trainer.step < trainer.total
    if processes.first:
        end(trainer, folder, stopped)
    if repository and not stopped:
        trackers.upload(options, repository)
    folder.close()
    processes.close()
    return 128 + stop if stopped else 0


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` updates, or never if that is 0, is due after `step`."""
    return interval > 0 and step % interval == 0


def describe(trainer: Trainer, held_out) -> str:
    """What is about to be trained, on what and for how long."""
    held = f"\n  held out: {len(held_out)}" if held_out else ""
    count = sum(p.numel() for p in trainer.parameters)
    length = f"{trainer.total} updates of {trainer.images_per_update} pictures"
    device = trainer.method.device
    return f"{trainer.method.describe()}{held}\n{count:,} parameters train, {length}, {device}"


def micro_batches(trainer: Trainer, dataset) -> Iterator[dict]:
    """This process's batches for all updates that are left, of cached latents if the options ask for that."""
    method, options, processes = trainer.method, trainer.method.options, trainer.processes
    stream = Stream(dataset, options.seed)
    if isinstance(options, Training) and options.cache_latents:
        cache_latents(stream, method.sd.encode_images, options.train_batch_size, processes)
    return batches(
        stream,
        first=trainer.samples,
        count=(trainer.total - trainer.step) * options.gradient_accumulation_steps,
        batch_size=options.train_batch_size,
        workers=options.dataloader_num_workers,
        rank=processes.rank,
        world=processes.world,
    )


def after_update(trainer: Trainer, held_out, folder: RunFolder, log: Log) -> None:
    """The log, an intermediate result and validation, where they are due."""
    method, step, epoch = trainer.method, trainer.step, trainer.updates_per_epoch
    last = step == trainer.total
    if method.device.type == "cpu" or is_due(step, 10) or last:
        log.flush()
    if is_due(step, method.save_interval(epoch)):
        with trainer.averaged():
            method.save_intermediate(folder.path, step)
    if is_due(step, method.options.validation_interval(epoch)) or (last and held_out):
        log.flush()
        with trainer.averaged():
            validate(method, held_out, folder, step, images=not last)


def end(trainer: Trainer, folder: RunFolder, stopped: bool) -> None:
    """Say how to continue a run that was stopped, or save the result of a complete one."""
    if stopped:
        length = f"{trainer.step} of {trainer.total}"
        print(f"stopped at update {length}; --resume_from_checkpoint latest continues", file=sys.stderr)
        return
    with trainer.averaged():
        trainer.method.save(folder.path)
        folder.save_image(trainer.step, "result", trainer.method.preview(final=True), "result.png")
    print(f"saved to {folder.path}; {folder.path / 'result.png'} shows what it learned")


def cache_latents(stream: Stream, encode: Callable, batch_size: int, processes: Processes) -> None:
    """Encode every view of every image once, each process its share. Mean and deviation are kept, so that
    each use samples anew."""
    moments = {}
    parts = stream.views(batch_size)[processes.rank :: processes.world]
    for part in tqdm(parts, desc="encoding pictures", leave=False, disable=not processes.first):
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        moments.update(zip(part, zip(mean.cpu(), std.cpu(), strict=True), strict=True))
    for shared in processes.gather(moments):
        stream.moments.update(shared)


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
        print("\nstopping after this update; a second signal stops at once", file=sys.stderr)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
