"""Hostile runs for hostile.py: signals at any moment, outputs that are closed, processes that disagree."""

import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from tests.hostile_files import DRAW, TRAIN, Assets, Case

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


def signalled(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """One or two signals at random moments, before, while and after it trains or draws."""
    numbers = rng.choice([
        [signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGTERM] * 2,
        [signal.SIGINT, signal.SIGTERM], [signal.SIGSTOP, signal.SIGCONT], [signal.SIGWINCH],
    ])  # fmt: skip
    times = sorted(rng.uniform(0, 1.5) for _ in numbers)
    flags, program = rng.choice([draws, trains])(assets, folder)
    what = ", ".join(f"{signal.Signals(n).name} after {t:.2f} s" for t, n in zip(times, numbers, strict=True))
    signals = tuple(zip(times, numbers, strict=True))
    return Case(f"{program}: {what}", flags, program, leaves=True, signals=signals, ends=(0, *STOPPED))


def unheard(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """Nobody reads what it says: a closed pipe, a full disk."""
    flags, program = rng.choice([draws, trains])(assets, folder)
    where = rng.choice(["pipe", "/dev/full"])
    ends = (0, 2, 120, 128 + signal.SIGPIPE, -signal.SIGPIPE)  # 120 is Python's for what it could not flush
    return Case(f"{program} > {where}", flags, program, leaves=True, stdout=where, ends=ends)


def disagreeing(rng: random.Random, assets: Assets, folder: Path) -> Case:
    """Two processes of one run, of which the second has other flags, another number or another world."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags, program = trains(assets, folder)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    first = shared | {"RANK": "0", "WORLD_SIZE": "2"}
    second = shared | {"RANK": "1", "WORLD_SIZE": "2"}
    own, refuse = rng.choice([
        ([], False), (["--seed=1"], True), (["--data", str(folder)], True), (["--rank=3"], True),
        (["--learning_rate=2e-4"], True), (["--method", "dreambooth"], True), (["--model", "x"], True),
        (["--train_batch_size=3"], True), (["--mixed_precision=bf16"], True), (["--center_crop"], True),
    ])  # fmt: skip
    other = rng.choice([{}, {}, {"RANK": "7"}, {"WORLD_SIZE": "1"}, {"RANK": "x"}]) if not own else {}
    what = f"two processes, the second with {' '.join(own) or other or 'the same'}"
    return Case(
        what, flags, program, refuse=refuse, leaves=True, environment=first, ends=(0, 1, 2),
        second=([*flags, *own], second | other),
    )  # fmt: skip


def draws(assets: Assets, folder: Path) -> tuple[list[str], str]:
    return ["--model", str(assets.model), "--prompt", "x", *DRAW, "--steps", "20"], "sample.py"


def trains(assets: Assets, folder: Path) -> tuple[list[str], str]:
    flags = ["--model", assets.model, "--data", assets.data, "--output_dir", folder / "out", *TRAIN]
    return ["--method", "lora", *map(str, flags), "--checkpointing_steps", "1"], "train.py"


KINDS: dict[str, Callable[[random.Random, Assets, Path], Case]] = {
    "signals": signalled,
    "unheard output": unheard,
    "processes that disagree": disagreeing,
}
