"""What a command writes to the terminal, where lines go above a progress bar, never into it, and its Ctrl-C.
Standard library only.

A bar is what tqdm writes after a carriage return. Where stderr is no terminal but a file, a bar is a line
every few seconds and one at its end.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from minisd.spelling import as_written

SECONDS = 10.0  # between two lines of a bar in a file
# For tqdm: a bar that may cover a longer one. Of several processes the first has one.
BRIEF = {"leave": False, "position": 0, "dynamic_ncols": True, "disable": os.environ.get("RANK", "0") != "0"}


class Terminal:
    """The bar that stands in the last line of the terminal, if any."""

    def __init__(self):
        self.bar, self.said, self.open = "", 0.0, False  # `open`: a line above the bar has not ended yet


class Stream:
    """A text stream that shares the last line with a bar."""

    def __init__(self, terminal: Terminal, stream: TextIO):
        self.terminal, self.stream, self.live = terminal, stream, stream.isatty()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        t = self.terminal
        if text.startswith("\r"):
            self._show(text)
        elif text == "\n" and t.bar and not t.open:  # the bar has come to its end, and stays
            self.stream.write("\n" if self.live else f"{t.bar}\n")
            t.bar = ""
        elif text:
            bar = t.bar if self.live else ""
            erased = "\r" + " " * len(bar) + "\r" if bar and not t.open else ""
            t.open = not text.endswith("\n")
            self.stream.write(f"{erased}{text}" + (f"\r{bar}" if bar and not t.open else ""))
        return len(text)

    def _show(self, text: str) -> None:
        """Draw a bar over the one before, or note it for a line that is due later."""
        t = self.terminal
        if not t.bar:
            t.said = time.monotonic()
        before, t.bar = t.bar, text.strip("\r ")
        if self.live:
            self.stream.write(f"\r{t.bar.ljust(len(before))}" + ("" if t.bar else "\r"))
        elif t.bar and time.monotonic() - t.said >= SECONDS:
            t.said = time.monotonic()
            self.stream.write(f"{t.bar}\n")


@contextmanager
def shared() -> Iterator[None]:
    """Inside the `with`, stdout and stderr leave the bars whole."""
    terminal, before = Terminal(), (sys.stdout, sys.stderr)
    with open(os.devnull, "w") as nowhere:  # instead of those that are closed, which are None
        sys.stdout, sys.stderr = (Stream(terminal, stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the `with`, what gets out after a SIGINT is a KeyboardInterrupt, whatever it was: code in C or
    Rust that is interrupted may raise an error of its own instead. Another handler than Python's stays."""
    heard, ours = [], signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def hear(number: int, frame) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    if ours:
        signal.signal(signal.SIGINT, hear)
    try:
        yield
    except BaseException as e:
        if heard:
            raise KeyboardInterrupt from e
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def complain(prog: str, message: str) -> int:
    """Print an error in one line of at most 1,000 characters. Returns the exit status for wrong input."""
    text = " ".join(as_written(message).split())
    text = text if len(text) <= 1000 else f"{text[:500]} ... {text[-450:]}"
    with suppress(OSError):  # nobody reads it, or the disk is full
        print(f"{prog}: error: {text}", file=sys.stderr)
    return 2
