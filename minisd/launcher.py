"""What `accelerate launch` asks of the command that it starts, by environment variables. Standard library
only.

It is honoured, refused with an error, or, where it only concerns speed, said not to be used.
"""

import os
from collections.abc import Mapping
from typing import get_args

from minisd.options import PRECISIONS, require

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP by a config (use --shard fsdp)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
UNUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend",
    "ACCELERATE_CPU_AFFINITY": "--enable_cpu_affinity",
    "ACCELERATE_DEBUG_MODE": "--debug",
}
MPI_SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"  # numbers of processes


def is_on(variable: str) -> bool:
    """Whether an environment variable is set, and not to a word for "no"."""
    return os.environ.get(variable, "").lower() not in ("", "0", "no", "false")


def flags(given: Mapping[str, object], own_precision: str | None) -> dict[str, object]:
    """The flags that the launcher sets, by name. `given` are those of the command line, which have priority;
    `own_precision` is the method's default for --mixed_precision, or None if it leaves that to the launcher.
    ValueError if the launcher asks for what minisd does not have."""
    for variable, what in REFUSED.items():
        require(not is_on(variable), f"accelerate launch asks for {what}, which minisd does not have")
    if "WORLD_SIZE" not in os.environ and any(int(os.environ.get(name) or 1) > 1 for name in MPI_SIZES):
        raise ValueError("started by MPI: its processes would not share the work; use torchrun")
    for variable, flag in UNUSED.items():
        if is_on(variable):
            _say(f"accelerate launch {flag}: not used, minisd does without")
    if is_on("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        _say("accelerate launch --cpu has started one process alone; torchrun starts several on a CPU")
    values, steps = {}, os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps.isdigit():
        values["gradient_accumulation_steps"] = int(steps)
        if given.get("gradient_accumulation_steps", int(steps)) != int(steps):
            raise ValueError(f"--gradient_accumulation_steps is not accelerate's {steps}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if "mixed_precision" in given or precision in ("no", own_precision):
        return values
    if own_precision is not None:
        _say(
            f"accelerate launch --mixed_precision {precision}: not used; this method heeds its own flag alone"
        )
        return values
    if precision not in get_args(PRECISIONS):
        raise ValueError(f"accelerate launch --mixed_precision {precision}: minisd has no, fp16 or bf16")
    return values | {"mixed_precision": precision}


def _say(line: str) -> None:
    """Print a line in the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(line)
