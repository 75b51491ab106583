"""What people read while a training runs: where it stands, its figures, the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphprune.progress import Task as ProgressTask
from graphprune.training.recipe import Moment

__all__ = ["Words"]

DESCRIBE_SECONDS = 1.0
"""How often the words beside the bar change."""


class Words:
    """Describes one run; time left is judged by the steps since this object was made."""

    def __init__(self, name: str, metric_name: str, start: Moment) -> None:
        """Describe the run `name`, which goes on from `start`."""
        self.name = name.partition("{")[0]
        self.metric_name = metric_name
        self.first_step = start.steps
        self.started = self.described = time.monotonic()

    def epoch(self, moment: Moment, last: Mapping[str, Any], macs: int | None) -> str:
        """Return the heading of an epoch, with the figures of the one before."""
        figures = []
        if last:
            key = f"test_{self.metric_name}"
            figures += [f"loss {last['loss']:.4f}", f"test {self.metric_name} {last[key]:.4f}"]
        return self._line(moment, figures, macs)

    def step(self, task: ProgressTask, moment: Moment, sums: Tensor, macs: int | None) -> None:
        """Put the figures of the epoch so far beside its bar, now and then."""
        now = time.monotonic()
        if now - self.described < DESCRIBE_SECONDS:
            return
        self.described = now
        loss, metric = (sums / moment.step).tolist()
        figures = [f"loss {loss:.4f}", f"{self.metric_name} {metric:.4f}"]
        task.describe(self._line(moment, figures, macs))

    def _line(self, moment: Moment, figures: list[str], macs: int | None) -> str:
        parts = [f"{self.name} epoch {moment.epoch + 1} of {moment.epochs}", *figures]
        if macs is not None:
            parts.append(f"{macs / 1e6:,.1f} M MACs")
        if done := moment.steps - self.first_step:
            to_do = moment.epochs * moment.steps_per_epoch - moment.steps
            seconds = (time.monotonic() - self.started) / done * to_do
            parts.append(f"about {_duration(seconds)} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
