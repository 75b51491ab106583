"""Where to compute, and which of several processes this is."""

from __future__ import annotations

import os

import torch

from graphprune.errors import UsageError

__all__ = ["is_main_process", "pick_device", "process_count", "take_own_gpu"]


def pick_device(device: str) -> str:
    """Return the device to compute on: what was asked for, or with ``auto`` the GPU if there is one.

    Raises:
        UsageError: No such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {device!r}") from error
    if kind.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {device!r}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu, or see `graphprune doctor`"
        )
    return device


def is_main_process() -> bool:
    """Return whether this is the only process, or the first of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Return how many processes a launcher started; 1 where there was none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_own_gpu() -> None:
    """Make ``cuda`` mean the GPU that belongs to this process, where a launcher started one process per GPU."""
    own = int(os.environ.get("LOCAL_RANK", "-1"))
    if 0 <= own < torch.cuda.device_count():
        torch.cuda.set_device(own)
