"""Where to compute."""

from __future__ import annotations

import torch

from graphprune.errors import UsageError

__all__ = ["pick_device"]


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
