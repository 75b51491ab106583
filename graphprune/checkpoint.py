"""Checkpoints: everything that an interrupted pass goes on from, in one file that is whole or absent.

The folder of a training holds ``state.pt``, its last state, and ``metrics.jsonl``, one line per epoch so far; that of
a pass that measures holds ``measured.pt`` (`graphprune.measured`). States are read without running code from the file.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import CheckpointError
from graphprune.files import json_line, prepare_out, write_atomic
from graphprune.program import Program

__all__ = ["MEASURED", "Checkpoint", "absolute_sums"]

MEASURED = "measured.pt"
"""State of a pass that measures; by itself, without that of a training, nothing goes on from it."""

VERSION = 2

_NOUNS = {
    "run": "pass",
    "recipe": "recipe",
    "program": "program",
    "costs": "measured costs",
    "weights": "weights to start from",
    "data": "data",
    "seed": "seed",
    "processes": "number of processes",
}
"""What a checkpoint must have in common with the run that goes on from it, and what that is called."""

_WEIGHTS_RTOL = 1e-3
"""Weights that a GPU computed before the training starts may differ by rounding; another model's differ by far more."""


class Checkpoint:
    """The folder in which one pass keeps its state."""

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, name: str = "state.pt"
    ) -> None:
        """Use the file `name` in `folder`; `identity` holds what is compared to tell one run from another."""
        self.folder = folder
        self.identity = dict(identity)
        self.path = folder / name
        self.metrics = folder / "metrics.jsonl"

    def prepare(self, *, keep: bool) -> None:
        """Make the folder, without what killed runs left half written; `keep` keeps the last state."""
        if not keep and self.folder.is_dir():
            shutil.rmtree(self.folder)
        prepare_out(self.folder)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the last state; None where there is none yet.

        Raises:
            CheckpointError: The file cannot be read, or another run wrote it.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            version, identity = state["version"], state["identity"]
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(
                f"expected a checkpoint at {str(self.path)!r}, found a file that cannot be read "
                f"({type(error).__name__}); remove it, or start over without --resume"
            ) from error
        if version != VERSION:
            raise CheckpointError(
                f"checkpoint {str(self.path)!r} has version {version!r}, this graphprune reads version {VERSION}; "
                "start over without --resume"
            )
        for name, noun in _NOUNS.items():
            if not _is_same(identity.get(name), self.identity.get(name)):
                raise CheckpointError(
                    f"checkpoint {str(self.path)!r} belongs to another run: its {noun} is {_text(identity.get(name))}, "
                    f"this run's is {_text(self.identity.get(name))}; repeat the command that was interrupted, "
                    "or start over without --resume"
                )
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Put a new state in the place of the last one."""
        with write_atomic(self.path) as temporary:
            torch.save({"version": VERSION, "identity": self.identity, **state}, temporary)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the metrics of all epochs so far, one JSON object a line."""
        with write_atomic(self.metrics) as temporary:
            temporary.write_text(
                "".join(f"{json_line(line)}\n" for line in lines), encoding="utf-8"
            )


def absolute_sums(program: Program) -> torch.Tensor:
    """Return one number per parameter, by which a checkpoint tells one model from another."""
    sums = [p.detach().abs().sum(dtype=torch.float64).cpu() for p in program.module.parameters()]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=_WEIGHTS_RTOL, atol=0.0)
    return bool(a == b)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"of absolute sum {float(value.sum()):.6g}"
    return repr(value)
