"""The lock of a run's folder: one run writes there at a time."""

import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where only the runs of one process are kept apart
    fcntl = None

NAME = ".lock"  # within the folder
held: set[Path] = set()  # what this process has locked


class Lock:
    """Held from construction until `release`, or until the process ends in whatever way: the system frees it
    then, on every machine that shares the folder. The file says who holds it, by process id and host.

    ValueError, naming that process, if another run holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder.resolve() / NAME
        if self.path in held:  # the file must not even be opened: closing it again would free the lock
            raise ValueError(f"--output_dir {folder} is in use by another run of this process")
        while not self.take(folder):
            pass
        if owner := self.owner():
            print(f"taking over {folder} from {owner}, which ended without a word")
        held.add(self.path)
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def take(self, folder: Path) -> bool:
        """Open and lock the file. False if its owner ended, and so removed it, at this very moment. Unlike
        other kinds of locks, this does not pass on to the processes that load images, which live longer."""
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"--output_dir {folder}: {error.strerror}") from None
        try:
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = self.owner() or "another process"
            os.close(self.file)
            raise ValueError(f"--output_dir {folder} is in use by {owner}: give another folder") from None
        except OSError as error:
            print(f"--output_dir {folder} cannot be locked ({error.strerror}): start no second run there")
        if os.fstat(self.file).st_nlink:
            return True
        os.close(self.file)
        return False

    def owner(self) -> str:
        """Who the file says holds the lock, or held it."""
        return os.pread(self.file, 1000, 0).decode(errors="replace")

    def release(self) -> None:
        """Let others have the folder."""
        self.path.unlink(missing_ok=True)
        held.discard(self.path)
        os.close(self.file)
