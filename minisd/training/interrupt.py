"""Stopping a run by a signal, after an update and with a checkpoint."""

import signal
import sys


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
