"""Progress of long work: one protocol, a silent implementation, and one that draws bars on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

__all__ = ["PATIENCE_S", "BarProgress", "Progress", "SilentProgress", "Task"]

PATIENCE_S = 2.0
"""Work that ends within this many seconds draws nothing."""


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps as done."""

    def describe(self, description: str) -> None:
        """Say in other words what is going on, for instance with the loss so far."""


class Progress(Protocol):
    """Where passes announce work that may take more than two seconds."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Open a piece of work of `total` steps (None: unknown); leaving the context ends it."""


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        """Count nothing."""

    def describe(self, description: str) -> None:
        """Show nothing."""


class SilentProgress:
    """Shows nothing: the default of every Python function."""

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Open a piece of work that nobody watches."""
        yield _SilentTask()


class _BarTask:
    def __init__(self, bars: BarProgress, description: str, total: int | None) -> None:
        self._bars = bars
        self._started = time.monotonic()
        self._task = bars.rich.add_task(description, total=total, visible=False)

    def advance(self, n: int = 1) -> None:
        """Count `n` more steps; the bar appears once the work has taken longer than the patience."""
        self._bars.rich.advance(self._task, n)
        if time.monotonic() - self._started >= self._bars.patience_s:
            self._bars.show(self._task)

    def describe(self, description: str) -> None:
        """Change the words beside the bar; a stream that is no terminal keeps the first ones."""
        self._bars.rich.update(self._task, description=description)

    def close(self) -> None:
        self._bars.rich.remove_task(self._task)


class BarProgress:
    """Draws bars on standard error, for work that takes longer than two seconds; use it as a context manager.

    On a stream that is not a terminal, each piece of work that outlasts the patience prints its description once.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        patience_s: float = PATIENCE_S,
        is_shown: bool = True,
    ) -> None:
        """Draw on `console` (standard error unless given), or nowhere."""
        self.console = console or Console(stderr=True, quiet=not is_shown)
        self.patience_s = patience_s
        self.rich = RichBars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            auto_refresh=self.console.is_terminal,
        )
        self._is_live = False

    def __enter__(self) -> BarProgress:
        """Return this object; nothing is drawn before the first bar is due."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bars off the screen."""
        if self._is_live:
            self.rich.stop()
            self._is_live = False

    def show(self, task_id: int) -> None:
        """Make a bar visible (a line of text where standard error is not a terminal)."""
        task = next(t for t in self.rich.tasks if t.id == task_id)
        if task.visible:
            return
        self.rich.update(task.id, visible=True)
        if not self.console.is_terminal:
            self.console.print(f"{task.description} ...", highlight=False)
            return
        if not self._is_live:
            self.rich.start()
            self._is_live = True

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Open a piece of work; its bar shows after the patience has run out."""
        task = _BarTask(self, description, total)
        try:
            yield task
        finally:
            task.close()
