"""Processes that train one model, started by torchrun: one per GPU with nccl, or on CPUs with gloo."""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from minisd import launcher
from minisd.device import usable
from minisd.files import first_line

JOIN = timedelta(minutes=5)  # until all processes have started
STEP = timedelta(minutes=10)  # until all have the gradients of an update
WORK = timedelta(hours=2)  # while one prepares data, draws, saves, or times kernels, and the others wait
BEAT, MISSED = 2.0, 15  # seconds between a process's signs of life, and how many may be missing


def number(variable: str, default: int) -> int:
    """A number that the launcher sets in the environment. ValueError, naming the variable, if it is none."""
    text = os.environ.get(variable, str(default))
    if not (text.isdecimal() and len(text) < 10):
        raise ValueError(f"the launcher's {variable} is {text!r}, which is not a whole number")
    return int(text)


def device(name: str | None = None) -> torch.device:
    """The device called `name`; by default this process's own GPU, or the CPU: without a GPU, or by
    `accelerate launch --cpu`. ValueError, naming the flag, if there is no such device."""
    if name is None and (launcher.is_on("ACCELERATE_USE_CPU") or not torch.cuda.is_available()):
        return torch.device("cpu")
    chosen = usable(name) if name else torch.device("cuda")
    if chosen.type == "cuda":
        chosen = torch.device(name if name and ":" in name else f"cuda:{number('LOCAL_RANK', 0)}")
        torch.cuda.set_device(chosen)
    return chosen


class Processes:
    """This process's place among those that train together. With one process, no method does anything."""

    def __init__(self, kind: str = "cpu"):
        self.kind = kind  # of the device
        self.rank, self.world = number("RANK", 0), number("WORLD_SIZE", 1)
        if self.rank >= self.world:
            raise ValueError(f"the launcher's RANK {self.rank} is not below its WORLD_SIZE {self.world}")
        self.first = self.rank == 0  # the process that writes
        self.ended, self.heard = threading.Event(), 0  # the latest beat at which all were heard
        if self.world > 1:
            try:
                self._join()
            except (ValueError, TypeError, RuntimeError) as e:
                who = f"process {self.rank} of {self.world}"
                raise ValueError(f"{who} did not join the others: {first_line(e)}") from e

    def _join(self) -> None:
        """Meet the other processes."""
        # Two connections, because one is blocked while it waits for an answer.
        connections = [next(dist.rendezvous("env://", timeout=JOIN))[0] for _ in range(2)]
        attempt = self._attempt(connections[0])
        store, beats = (dist.PrefixStore(attempt, connection) for connection in connections)
        backend = "nccl" if self.kind == "cuda" else "gloo"
        # Before the group is made, which waits long for a process that has ended in between.
        threading.Thread(target=self._watch, args=[beats], daemon=True).start()
        threading.Thread(target=self._guard, daemon=True).start()
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=STEP)
        self.control = dist.new_group(backend="gloo", timeout=WORK)
        self.answers = dist.PrefixStore("answers", store)
        store.set_timeout(WORK)

    def _attempt(self, store: dist.Store) -> str:
        """A name for this start of the processes, the same in all. When torchrun starts them again after a
        failure, they meet in the same store, where the addresses of those that have ended still are."""
        own, deadline = secrets.token_hex(8), time.monotonic() + JOIN.total_seconds()
        others = [f"process {rank} of {self.world}" for rank in range(1, self.world)]
        if self.first:
            for other in others:  # what the living have written they write again
                store.delete_key(other)
            for other in others:
                store.wait([other])
                store.set(store.get(other).decode(), own)
            return own
        while not store.check([own]):
            if time.monotonic() > deadline:
                raise ValueError("process 0 does not answer")
            store.set(others[self.rank - 1], own)
            time.sleep(0.05)
        return store.get(own).decode()

    def _watch(self, store: dist.Store) -> None:
        """Give signs of life, and end this process, with a line, once another has given none for a while:
        the operations that wait for it cannot be interrupted. Counts are of this process's own beats, so that
        processes which were all stopped for a while go on."""
        beat, signs, missed = 0, [b""] * self.world, [0] * self.world
        try:
            while max(missed) < MISSED:
                beat, before = beat + 1, signs
                store.set(f"sign {self.rank}", f"{beat} {socket.gethostname()}")
                signs = store.multi_get([f"sign {rank}" for rank in range(self.world)])  # waits for the first
                missed = [n + 1 if a == b else 0 for n, a, b in zip(missed, before, signs, strict=True)]
                self.heard = beat
                if self.ended.wait(BEAT):
                    return
            lost = missed.index(max(missed))
            host = signs[lost].decode().partition(" ")[2]
            reason = f"process {lost} on {host} has given no sign of life for {MISSED * BEAT:.0f} seconds"
        except RuntimeError as e:
            reason = f"the connection to torchrun or process 0 is lost: {first_line(e)}"
        self._lose(reason)

    def _guard(self) -> None:
        """End this process if `_watch` waits without limit: torch's store does so for a process 0 that was
        killed, as long as a worker that it forked holds the connection."""
        heard = missed = 0
        while missed < 2 * MISSED + (0 if heard else JOIN.total_seconds() / BEAT):
            if self.ended.wait(BEAT):
                return
            heard, missed = self.heard, missed + 1 if self.heard == heard else 0
        self._lose(f"process 0 has not answered for {missed * BEAT:.0f} seconds")

    def _lose(self, reason: str) -> None:
        if not self.ended.is_set():
            print(f"\ntrain.py: error: {reason}; process {self.rank} ends", file=sys.stderr, flush=True)
            os._exit(1)

    def agree(self, number: int) -> int:
        """The largest `number` of all processes, so that they stop after the same update."""
        shared = torch.tensor(number)
        if self.world > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.item()

    def gather(self, value) -> list:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, items: Sequence, function: Callable[[Sequence], list]) -> list:
        """function(items), which has a result for each of them; every process computes some."""
        own = items[self.rank :: self.world]
        found = self.gather(function(own) if own else [])
        return [found[k % self.world][k // self.world] for k in range(len(items))]

    def require_same(self, **values: object) -> None:
        """ValueError in every process, saying who differs in what, unless all have the same values."""
        everyone = self.gather({"host": socket.gethostname(), **values})
        for rank, theirs in enumerate(everyone):
            if differing := " and ".join(name for name in values if theirs[name] != everyone[0][name]):
                who = f"process {rank} on {theirs['host']}"
                raise ValueError(f"{who} has not the same {differing} as process 0 on {everyone[0]['host']}")

    def first_to_ask(self, question: str, answer: Callable[[], dict]) -> dict:
        """What `answer` returns in the first process that asks; the others wait for it."""
        if self.world == 1:
            return answer()
        if self.answers.add(f"asked {question}", 1) == 1:
            self.answers.set(question, json.dumps(answer()))
        return json.loads(self.answers.get(question))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the group once all processes have called this."""
        self.wait()
        self.ended.set()
        self.wait()  # until nobody watches any more
        if self.world > 1:
            dist.destroy_process_group()
