"""How far a picture travels from sample.py to the first call of the UNet.

    python tests/trace_picture.py [ROOT]

draws with the tiny model in the box and counts, by sys.setprofile, up to the first UNet.forward: the files of
the project that are entered, and the hops, where a function of one file calls into another. A function that
calls into the same file again, or in a loop, hops once. What runs while a module is imported does not count,
nor what torch calls by itself.

The second count takes three things as one step each, where the call counts and not what it leads to: reading
the command line (`parse_sample`), loading the model (`load` in sampling/run.py), and a network's forward.
"""

import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
Hop = tuple[str | None, str | None, str]  # the caller's file and function, the file called


class Arrived(BaseException):
    """The UNet was called."""


def trace(root: Path) -> tuple[set[Hop], set[Hop]]:
    """The hops in all, and those with three things as one step each."""
    hops: set[Hop] = set()
    short: set[Hop] = set()

    project = tuple(f"{root}/{part}" for part in ("sample.py", "minisd/", "kernels/"))

    @functools.cache  # it is asked in every call of a function, torch's too
    def file_of(name: str) -> str | None:
        return str(Path(name).relative_to(root)) if name.startswith(project) else None

    def file(frame: FrameType | None) -> str | None:
        return frame and file_of(frame.f_code.co_filename)

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not file(frame) or frame.f_code.co_name == "__torch_function__":
            return
        callers = []  # the project's functions above this one, the nearest first
        above = frame.f_back
        while above and above.f_code.co_name != "sample":
            callers += [above] if file(above) else []
            above = above.f_back
        if not above or any(f.f_code.co_name == "<module>" for f in [frame, *callers]):
            return
        caller = (callers or [above])[0]
        if file(caller) != file(frame):
            function = caller.f_code.co_qualname.partition(".<locals>.<")[0]  # a comprehension is part of it
            hop = file(caller), function, file(frame)
            hops.add(hop)
            if not any(is_one_step(file(f), f.f_code.co_name) for f in callers):
                short.add(hop)
        if file(frame).endswith("models/unet.py") and frame.f_code.co_name == "forward":
            raise Arrived

    sys.path.insert(0, str(root))
    sys.modules.pop("sample", None)
    import sample

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["sample.py", "--prompt", "a cat", "--device", "cpu", "--output", folder]
        sys.setprofile(profile)
        try:
            sample.main()
        except Arrived:
            pass
        finally:
            sys.setprofile(None)
    return hops, short


def is_one_step(file: str, function: str) -> bool:
    """Whether what this function calls is not counted."""
    return function in ("parse_sample", "forward") or (Path(file).name, function) == ("run.py", "load")


if __name__ == "__main__":
    for name, hops in zip(
        ("in all", "in short"), trace(Path((sys.argv[1:] or [ROOT])[0]).resolve()), strict=True
    ):
        files = {file for hop in hops for file in (hop[0], hop[2])}
        print(f"{name}: {len(files)} files, {len(hops)} hops")
        for hop in sorted(hops, key=str):
            print("   ", *hop)
