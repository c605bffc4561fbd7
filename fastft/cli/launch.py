"""`fastft train` in several processes, as `accelerate launch` and `torchrun` start them: each trains on its own batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of its machine's processes, and so of its GPUs."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def rank_0_speaks() -> Iterator[None]:
    """What other ranks print to stdout is dropped."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def wait() -> None:
    """Until all processes are here; they know each other since TrainingArguments were made."""
    if processes() > 1:
        import torch

        torch.distributed.barrier()


def check() -> None:
    """Raises UserError where the launcher asks for more than batches to be divided."""
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"fastft train divides the data among processes, not the model: launch it without {what} (for a model that "
                "needs it, write a loop with fastft.attach and fully_shard)"
            )


def check_resume(checkpoint: Path) -> None:
    """Raises UserError if the run that wrote `checkpoint` had another number of processes: its batches were others."""
    had = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if had != processes():
        raise UserError(f"--resume: the run had {had} processes, now there are {processes()}; launch it with {had}")
