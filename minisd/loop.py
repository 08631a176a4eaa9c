"""The training loop: one function, the same for every method."""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from minisd import noise, optim
from minisd.data.batches import Stream, batches
from minisd.run import Hub, Interrupt, Run, State, memory


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state as "NAME|KEY" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}|{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("|")
        state.setdefault(names.index(parameter), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def cache_latents(stream: Stream, encode: Callable, batch_size: int) -> None:
    """Encode every view of every picture once: mean and deviation are kept, so that each use draws anew."""
    views = stream.dataset.views()
    for start in tqdm(range(0, len(views), batch_size), desc="encoding pictures", leave=False):
        part = views[start : start + batch_size]
        mean, std = encode(torch.stack([stream.dataset.pixels(view) for view in part]))
        stream.moments.update(zip(part, zip(mean.cpu(), std.cpu(), strict=True), strict=True))


def train(method, run: Run) -> int:
    """Train until the options' last update. Returns the exit status: 0, or 128 + the signal that ended it.

    Everything is counted in optimizer updates: steps, the learning rate's curve, checkpoints, validation.
    """
    options, device = method.options, method.device
    accumulation = options.gradient_accumulation_steps

    # What trains, on what
    state = run.resume()
    torch.manual_seed(options.seed)
    trained = method.build()  # name -> parameter
    names, parameters = list(trained), list(trained.values())
    stream = Stream(method.dataset(), options.seed)
    per_update = options.train_batch_size * accumulation
    per_epoch = math.ceil(len(stream.dataset) / per_update)
    total = options.max_train_steps or options.num_train_epochs * per_epoch
    every = options.validation_epochs * per_epoch if options.validation_epochs else options.validation_steps

    optimizer = optim.adamw(parameters, options)
    lr = options.learning_rate * (per_update if options.scale_lr else 1)
    curve = {"warmup": options.lr_warmup_steps, "total": total, "lr": lr}
    curve |= {"cycles": options.lr_num_cycles, "power": options.lr_power}
    scaler = torch.amp.GradScaler(device.type, enabled=options.mixed_precision == "fp16")
    step, samples = 0, 0
    if state:
        step, samples = state.step, state.samples
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.tensors[name])
        load_optimizer(optimizer, names, state.optimizer)
        if state.scaler:
            scaler.load_state_dict(state.scaler)

    hub = Hub(options) if options.push_to_hub else None
    run.start()
    count = sum(p.numel() for p in parameters)
    print(
        f"{method.describe()}\n{count:,} parameters train, {total} updates of {per_update} pictures, {device}"
    )
    if method.cache_latents and stream.dataset.views() is not None:
        cache_latents(stream, method.sd.encode_images, options.train_batch_size)

    def save() -> None:
        run.save(
            State(
                step=step,
                samples=samples,
                tensors={name: p.detach().cpu() for name, p in trained.items()},
                optimizer=optimizer_tensors(optimizer, names),
                scaler=scaler.state_dict(),
            )
        )

    source = batches(
        stream,
        first=samples,
        count=(total - step) * accumulation,
        batch_size=options.train_batch_size,
        workers=options.dataloader_num_workers,
    )
    pending: list[tuple[int, Tensor, Tensor, float]] = []  # what is logged once the device has caught up
    bar = tqdm(total=total, initial=step, desc=run.plain["method"], dynamic_ncols=True)

    def flush() -> None:
        if not pending:
            return
        losses = torch.stack([loss for _, loss, _, _ in pending]).tolist()
        norms = torch.stack([norm for _, _, norm, _ in pending]).tolist()
        for (at, _, _, rate), loss, norm in zip(pending, losses, norms, strict=True):
            run.log(at, loss=loss, lr=rate, grad_norm=norm)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of update {at} is {loss}; it was not saved, and the last checkpoint is good. "
                    "A lower --learning_rate, or --mixed_precision bf16 or no, may help"
                )
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2g}", mem=memory(), refresh=False)
        pending.clear()

    with Interrupt() as interrupt, bar:
        while step < total and interrupt.signal is None:
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
            scaler.unscale_(optimizer)
            norm = optim.clip(parameters, options.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            step, samples = step + 1, samples + per_update
            bar.update()
            pending.append((step, loss_sum, norm, rate))
            saving = options.checkpointing_steps and step % options.checkpointing_steps == 0
            if device.type == "cpu" or step % 10 == 0 or saving or step == total:
                flush()
            if saving:
                save()
            method.after_update(step)
            if options.validation_prompt and step % every == 0 and step < total:
                run.picture(step, "validation", method.validation(), f"validation/step-{step:06}.png")

        if interrupt.signal is not None:
            flush()
            save()

    if interrupt.signal is not None and step < total:
        print(
            f"stopped at update {step} of {total}; --resume_from_checkpoint latest goes on", file=sys.stderr
        )
        run.close()
        return 128 + interrupt.signal
    method.save(run.folder)
    run.picture(step, "result", method.result(), "result.png")
    print(f"saved to {run.folder}; {run.folder / 'result.png'} shows what it learned")
    run.close()
    if hub:
        hub.push()
    return 0
