"""The training loop: one function, the same for every method."""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from minisd import noise
from minisd.data.order import Stream, batches
from minisd.training import optim
from minisd.training.distributed import Processes
from minisd.training.run_folder import Hub, Interrupt, Run, State, memory


def snapshot(step, samples, names, parameters, optimizer, scaler, ema) -> State:
    """Everything that a run goes on from: the optimizer's state as NAME|KEY, the average as NAME|average."""
    slots = optimizer.state_dict()["state"]
    tensors = {f"{names[i]}|{k}": torch.as_tensor(v) for i, slot in slots.items() for k, v in slot.items()}
    if ema:
        tensors |= {f"{name}|average": a for name, a in zip(names, ema.average, strict=True)}
    return State(
        step=step,
        samples=samples,
        tensors={name: p.detach() for name, p in zip(names, parameters, strict=True)},
        optimizer=tensors,
        scaler=scaler.state_dict(),
    )


def restore(state: State, names, parameters, optimizer, scaler, ema) -> None:
    """Put it all back."""
    by_name = dict(zip(names, parameters, strict=True))
    slots: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, value in state.optimizer.items():
        parameter, _, key = name.rpartition("|")
        own = torch.empty_like(value)
        if value.shape == by_name[parameter].shape:  # then in the same memory layout too
            own = torch.empty_like(by_name[parameter], dtype=value.dtype, device=value.device)
        slots[parameter][key] = own.copy_(value)
    averages = {name: slot.pop("average", None) for name, slot in slots.items()}
    by_number = {i: slots[name] for i, name in enumerate(names) if slots[name]}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            parameter.copy_(state.tensors[name])
        if ema:
            for name, average in zip(names, ema.average, strict=True):
                average.copy_(averages[name])
    if state.scaler:
        scaler.load_state_dict(state.scaler)


def cache_latents(stream: Stream, encode: Callable, batch_size: int, processes: Processes) -> None:
    """Encode every view of every picture once, each process its share: mean and deviation are kept, so that
    each use draws anew."""
    own = {}
    parts = stream.views(batch_size)[processes.rank :: processes.world]
    for part in tqdm(parts, desc="encoding pictures", leave=False, disable=not processes.first):
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        own.update(zip(part, zip(mean.cpu(), std.cpu(), strict=True), strict=True))
    for shared in processes.gather(own):
        stream.moments.update(shared)


class Log:
    """Losses and norms stay on the device until somebody looks, so that logging does not hold up the GPU."""

    def __init__(self, run: Run, bar: tqdm):
        self.run, self.bar = run, bar
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        self.pending.append((step, loss, norm, lr))
        self.bar.update()

    def flush(self) -> None:
        """Write what has come since. ValueError if a loss is not a number."""
        if not self.pending:
            return
        steps, losses, norms, rates = zip(*self.pending, strict=True)
        self.pending.clear()
        values = zip(steps, torch.stack(losses).tolist(), torch.stack(norms).tolist(), rates, strict=True)
        for step, loss, norm, lr in values:
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of update {step} is {loss}; it was not saved, the last checkpoint is good. "
                    "A lower --learning_rate, or --mixed_precision bf16 or no, may help"
                )
            self.run.log(step, loss=loss, lr=lr, grad_norm=norm)
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2g}", mem=memory(), refresh=False)


def train(method, run: Run) -> int:
    """Train until the options' last update. Returns the exit status: 0, or 128 + the signal that ended it.

    Everything is counted in optimizer updates: steps, the learning rate's curve, checkpoints, validation.
    """
    options, device, processes = method.options, method.device, Processes()
    accumulation = options.gradient_accumulation_steps

    # What trains, on what
    state = run.resume()
    torch.manual_seed(options.seed)
    trained = method.build()  # name -> parameter
    names, parameters = list(trained), list(trained.values())
    stream = Stream(method.dataset(), options.seed)
    per_update = options.train_batch_size * accumulation * processes.world
    per_epoch = math.ceil(len(stream.dataset) / per_update)
    total = options.max_train_steps or options.num_train_epochs * per_epoch
    method.updates_per_epoch = per_epoch
    every = options.validation_epochs * per_epoch if options.validation_epochs else options.validation_steps

    # How it trains
    optimizer = optim.adamw(parameters, options)
    lr = options.learning_rate * (per_update * method.lr_scale if options.scale_lr else 1)
    curve = {"warmup": options.lr_warmup_steps, "total": total, "lr": lr}
    curve |= {"cycles": options.lr_num_cycles, "power": options.lr_power}
    scaler = torch.amp.GradScaler(device.type, enabled=method.dtype == torch.float16)
    ema = optim.EMA(parameters, options) if options.use_ema else None
    if ema:
        method.averaged = ema.applied
    step, samples = 0, 0
    if state:
        step, samples = state.step, state.samples
        restore(state, names, parameters, optimizer, scaler, ema)

    # What is left of it, and where
    hub = Hub(options) if options.push_to_hub and processes.first else None
    if processes.first:
        run.start()
        count = sum(p.numel() for p in parameters)
        print(method.describe())
        print(f"{count:,} parameters train, {total} updates of {per_update} pictures, {device}")
    if options.cache_latents:
        cache_latents(stream, method.sd.encode_images, options.train_batch_size, processes)

    def save() -> None:
        if processes.first:
            run.save(snapshot(step, samples, names, parameters, optimizer, scaler, ema))
        processes.wait()

    source = batches(
        stream,
        first=samples,
        count=(total - step) * accumulation,
        batch_size=options.train_batch_size,
        workers=options.dataloader_num_workers,
        rank=processes.rank,
        world=processes.world,
    )
    name = run.plain["method"]
    bar = tqdm(total=total, initial=step, desc=name, dynamic_ncols=True, disable=not processes.first)
    log = Log(run, bar)
    stop = 0  # the signal that asked for it
    with Interrupt() as interrupt, bar:
        while step < total and not stop:
            rate = lr * optim.lr_factor(options.lr_scheduler, step, **curve)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss_sum = torch.zeros((), device=device)
            for _ in range(accumulation):
                batch = next(source)
                # Dropout and the like, should a network have any: a stream for every micro-batch.
                torch.manual_seed(noise.generator(options.seed, "layers", batch["number"][0]).initial_seed())
                loss = method.loss(batch) / accumulation
                scaler.scale(loss).backward()
                loss_sum += loss.detach()
            processes.average([loss_sum, *(p.grad for p in parameters if p.grad is not None)])
            scaler.unscale_(optimizer)
            norm = optim.norm(parameters)
            scaler.step(optimizer, optim.shrink(norm, options.max_grad_norm))
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            step, samples = step + 1, samples + per_update
            if ema:
                ema.update(step)
            due = options.checkpointing_steps and step % options.checkpointing_steps == 0
            if processes.first:
                log.add(step, loss_sum, norm, rate)
                if device.type == "cpu" or step % 10 == 0 or due or step == total:
                    log.flush()
                method.after_update(step)
                if method.held_out and (step % every == 0 or step == total):
                    log.flush()
                    with method.averaged():
                        run.log(step, validation_loss=method.held_out_loss())
                if method.validates and step % every == 0 and step < total:
                    with method.averaged():
                        image = method.validation()
                    run.picture(step, "validation", image, f"validation/step-{step:06}.png")
            stop = processes.agree(interrupt.signal or 0)
            if stop or due:
                log.flush()
                save()

    if stop and step < total:
        if processes.first:
            print(
                f"stopped at update {step} of {total}; --resume_from_checkpoint latest goes on",
                file=sys.stderr,
            )
        run.close()
        processes.close()
        return 128 + stop
    if processes.first:
        with method.averaged():
            method.save(run.folder)
            run.picture(step, "result", method.result(), "result.png")
        print(f"saved to {run.folder}; {run.folder / 'result.png'} shows what it learned")
    if hub:
        hub.push()
    run.close()
    processes.wait()
    processes.close()
    return 0
