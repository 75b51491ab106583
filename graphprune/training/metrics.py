"""Metrics of a training: JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphprune.files import json_line

__all__ = ["EVENTS", "EventWriter", "publish"]

EVENTS = "tensorboard"
"""Folder of event files, in that of a checkpoint and in the output."""


def publish(
    history: Sequence[Mapping[str, Any]], *, out: Path | None, checkpoint: Path | None
) -> None:
    """Add what a complete training measured to the output: lines of metrics.jsonl, and event files of TensorBoard.

    Args:
        history: The metrics of every epoch.
        out: Folder of the output; None: there is none.
        checkpoint: Folder in which the training kept its state, and its event files.
    """
    if out is None or not history:
        return
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{json_line(line)}\n" for line in history)
    if checkpoint is not None and (checkpoint / EVENTS).is_dir():
        # over those of an earlier run in the same folder, which the new ones hide
        shutil.copytree(checkpoint / EVENTS, out / EVENTS / checkpoint.name, dirs_exist_ok=True)


class EventWriter:
    """TensorBoard event files in a folder; nothing at all where TensorBoard is not installed."""

    def __init__(self, folder: Path, *, start: int) -> None:
        """Write into `folder`; what an interrupted run wrote from epoch `start` on is hidden."""
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write every number of one epoch's metrics."""
        if self.writer is None:
            return
        for name, value in line.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["epoch"])
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.close()
