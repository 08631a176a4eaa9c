"""The training loop, the same for every method."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from minisd import files, ops, registry
from minisd.data.order import Stream, batches, collate
from minisd.device import configure, has_fast_bf16
from minisd.methods._base import Method
from minisd.options import TINY, Data, Model, Run, Training, free_flags, require
from minisd.training import check_data, checkpoint, distributed, latents, model_card, optim, report, trackers
from minisd.training.distributed import Processes
from minisd.training.run_folder import Log, RunFolder, conditions
from minisd.training.step import Trainer, networks

# Free flags that all processes have to have in common.
COMMON = {"max_train_steps", "num_train_epochs", "checkpointing_steps", "shard"}


def start(folder: RunFolder) -> int:
    """Train as the folder's options say. Returns the exit status, as `train`."""
    configure(folder.options)  # before CUDA starts
    kind = registry.load_class("methods", folder.recorded["method"])
    if folder.options.plan:
        from minisd.training import plan  # which imports torch's compiler

        return plan.report(kind, folder.options)
    try:
        return train(kind(folder.options, distributed.device(folder.options.device)), folder)
    except (MemoryError, RuntimeError) as e:
        if "memory" not in f"{type(e).__name__} {e}".lower():
            raise
        few = (spelled(flags) for flags in saving(folder.options) if flags.get("train_batch_size", 1) == 1)
        unused = ", ".join(few) or "a smaller --resolution alone is left"
        raise MemoryError(f"{files.first_line(e)} (what saves memory and is not used: {unused})") from e


def saving(o: Run) -> Iterator[dict[str, object]]:
    """Flags that would save memory and are not used, with their values: those first that cost the least time,
    docs/scale.md."""
    able = {f.name for f in fields(o) if not f.metadata.get("refused")}
    able -= {"use_8bit_adam"} if o.optimizer else set()
    if o.mixed_precision == "no":
        yield {"mixed_precision": "bf16"}
    off = [n for n in ("use_8bit_adam", "offload_ema") if n in able and not getattr(o, n)]
    yield from ({name: True} for name in off if name != "offload_ema" or o.use_ema)
    images = o.train_batch_size * o.gradient_accumulation_steps
    for size in range(o.train_batch_size - 1, 0, -1):
        if o.train_batch_size % size == 0:
            yield {"train_batch_size": size, "gradient_accumulation_steps": images // size}
    if "gradient_checkpointing" in able and not o.gradient_checkpointing:
        yield {"gradient_checkpointing": True}


def spelled(*changes: dict[str, object]) -> str:
    """Changes of flags as they are written."""
    flags = (flag for change in changes for flag in change.items())
    return " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in flags)


def train(method: Method, folder: RunFolder) -> int:
    """Train until the options' last update. Returns the exit status: 0, or 128 + the signal that ended it.
    With --check_data, only report on the data.

    Everything is counted in optimizer updates: steps, learning rate, checkpoints, validation.
    """
    if isinstance(method.options, Data) and method.options.check_data:
        return check_data.report(method)
    with folder:
        return run(method, folder)


def run(method: Method, folder: RunFolder) -> int:
    """As `train`, within the folder's lock."""
    options, processes = method.options, Processes(method.device.type)
    for flag in ("reduce_dtype", "shard"):
        require(processes.world > 1 or not options.is_given(flag), f"--{flag} is for several processes")

    # Start
    # Wrong flags and data are reported before a model is loaded. All do as the first process does.
    earlier = processes.gather(folder.resume() if processes.first else None)[0]
    agreed = free_flags(type(options)) - COMMON
    flags = {name: value for name, value in folder.recorded.items() if name not in agreed}
    processes.require_same(flags=flags, checkpoint=earlier is None or (earlier / checkpoint.STATE).is_file())
    optim.new([torch.zeros(1, 1, requires_grad=True)], options)  # a matrix, as Muon takes no other
    method.read()
    ops.pin(checkpoint.verdicts(earlier) if earlier else {}, processes.first_to_ask)
    torch.manual_seed(options.seed)
    method.share = processes.share
    if processes.first:
        method.prepare()
    processes.wait()
    trained = method.setup()
    dataset, held_out = method.datasets()
    weights = checkpoint.sums(networks(method), earlier) if processes.world > 1 else None
    trainer = Trainer(method, trained, len(dataset), processes)
    folder.conditions = conditions(dataset, processes.world, method.device)
    if earlier:
        folder.restore(trainer, earlier)
    processes.require_same(data=folder.conditions["data"], weights=weights)
    repository = None
    if processes.first:
        repository = trackers.create_repository(options)
        folder.start(trainer.step)
        print(describe(trainer, held_out))
    folder.save_before(trainer, earlier)
    processes.wait()
    source = micro_batches(trainer, dataset)

    # Updates
    log, stop = Log(folder, trainer.step, trainer.total, show=processes.first), 0
    with stop_signals() as signals, log.bar:
        while trainer.step < trainer.total and not stop:
            update = trainer.update(source)
            if processes.first:
                log.add(trainer.step, *update)
            after_update(trainer, held_out, folder, log)
            stop = processes.agree(sum(signals))  # a signal to any process, or 0
            if stop or is_due(trainer.step, options.checkpointing_steps):
                log.flush()
                # The kernels' verdicts of all processes: each may have met shapes of its own.
                kernels = {k: v for found in processes.gather(ops.verdicts()) for k, v in found.items()}
                folder.save_checkpoint(trainer, kernels)
                if processes.first:
                    report.write(folder.path)
                processes.wait()

    # End
    stopped = stop and trainer.step < trainer.total
    end(trainer, folder, stopped, repository)
    processes.close()
    return 128 + stop if stopped else 0


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` updates, or never if that is 0, is due after `step`."""
    return interval > 0 and step % interval == 0


def describe(trainer: Trainer, held_out) -> str:
    """A summary of what trains, on what data and for how long."""
    held = f"\n  held out: {len(held_out)}" if held_out else ""
    length = f"{trainer.total} updates of {trainer.images_per_update} images"
    device, options = trainer.method.device, trainer.options
    tiny = isinstance(options, Model) and options.model == str(TINY)
    advice = f"\nso few updates teach hardly anything: --max_train_steps {options.FEWEST}, or more"
    more = advice if trainer.total < options.FEWEST and not tiny else ""
    if options.mixed_precision == "bf16" and not has_fast_bf16(device.type):
        more += f"\n--mixed_precision bf16 takes longer here: this {device.type} is not made for it"
    elif options.mixed_precision == "no" and device.type == "cpu" and not tiny and has_fast_bf16("cpu"):
        more += "\nthis CPU is fast in bf16: --mixed_precision bf16 takes less time and memory"
    return f"{trainer.method.describe()}{held}\n{trainer.count:,} parameters train, {length}, {device}{more}"


def micro_batches(trainer: Trainer, dataset) -> Iterator[dict]:
    """This process's batches for the remaining updates, with cached latents if the options say so."""
    method, options, processes = trainer.method, trainer.method.options, trainer.processes
    stream = Stream(dataset, options.seed)
    if isinstance(options, Training) and options.cache_latents:
        latents.cache(stream, method, processes, options.output_dir)
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
    """Write the log, an intermediate result, held-out loss and validation images where they are due. All
    processes compute these, and the first writes."""
    method, step, epoch = trainer.method, trainer.step, trainer.updates_per_epoch
    first, last = trainer.processes.first, step == trainer.total
    if first:
        ops.say_verdicts()
    folder.written(wait=False)
    if method.device.type == "cpu" or is_due(step, 10) or last:
        log.flush()
    if is_due(step, method.save_interval(epoch)):
        folder.require_finite(trainer)
        with trainer.averaged():
            if first:
                method.save_intermediate(folder.path, step)
    if is_due(step, method.options.validation_interval(epoch)) or (last and held_out):
        log.flush()
        with trainer.averaged():
            loss = held_out_loss(method, held_out) if held_out else None
            image = None if last else method.preview()
        if first and loss is not None:
            folder.log(step, validation_loss=loss)
        if first and image is not None:
            folder.save_image(step, "validation", image, f"validation/step-{step:06}.png")
        if first:
            report.write(folder.path)


@torch.no_grad()
def held_out_loss(method: Method, held_out) -> float:
    """The mean loss of the held-out examples. Example k of n has the timestep (k + 1/2) / n of the schedule,
    and noise, crop and caption that depend on k alone."""
    stream, count = Stream(held_out, method.options.seed), len(held_out)
    total = method.sd.schedule.num_train_timesteps

    def losses(numbers: range) -> list[float]:
        found = []
        for k in numbers:  # each alone, because their shapes may differ
            fixed = {"number": f"held out {k}", "timestep": total * (2 * k + 1) // (2 * count)}
            found.append(method.loss(collate([[sample | fixed for sample in stream[k]]])))
        return torch.stack(found).tolist()

    return torch.tensor(method.share(range(count), losses)).mean().item()


def end(trainer: Trainer, folder: RunFolder, stopped: bool, repository: str | None) -> None:
    """Say how to continue a run that was stopped, or save the result of a complete one, and upload it to
    `repository` if that is not None. All processes draw, and the first writes."""
    folder.written()
    if stopped:
        length = f"{trainer.step} of {trainer.total}"
        if trainer.processes.first:
            print(f"stopped at update {length}; --resume_from_checkpoint latest continues", file=sys.stderr)
        return
    names = folder.save_result(trainer)
    if not trainer.processes.first:
        return
    if ops.verdicts():
        files.write_json(folder.path / "kernels.json", ops.verdicts())
    names += model_card.write(trainer, folder, names, repository)
    report.write(folder.path)
    print(f"saved to {folder.path}: result.png and report.html show what it learned")
    if repository:
        trackers.upload(trainer.options, repository, names)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which the first SIGINT or SIGTERM is added; a second one stops at once. Only the main
    thread hears of signals."""
    received = []

    def receive(number: int, frame) -> None:
        if received:
            if callable(earlier := before[signal.SIGINT]):
                earlier(signal.SIGINT, frame)  # see `terminal.interruptible`
            raise KeyboardInterrupt
        received.append(number)
        print("stopping after this update; a second signal stops at once", file=sys.stderr)

    hears = threading.current_thread() is threading.main_thread()
    heard = (signal.SIGINT, signal.SIGTERM) if hears else ()
    before = {s: signal.signal(s, receive) for s in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
