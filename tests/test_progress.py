"""Progress: silent by default, and late on standard error."""

from __future__ import annotations

import io

from rich.console import Console

from graphprune.progress import BarProgress, SilentProgress


def bars(*, patience_s: float, terminal: bool) -> tuple[BarProgress, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    return BarProgress(console=console, patience_s=patience_s), stream


def test_silence_takes_any_work() -> None:
    with SilentProgress().task("work", 3) as task:
        task.advance()
        task.advance(2)


def test_short_work_draws_nothing() -> None:
    progress, stream = bars(patience_s=60, terminal=True)
    with progress, progress.task("quick", 2) as task:
        task.advance(2)
    assert stream.getvalue() == ""


def test_long_work_draws_a_bar_on_a_terminal() -> None:
    progress, stream = bars(patience_s=0, terminal=True)
    with progress, progress.task("slow", 2) as task:
        task.advance()
        progress.rich.refresh()
    assert "slow" in stream.getvalue()
    assert "1/2" in stream.getvalue()


def test_long_work_prints_one_line_elsewhere() -> None:
    progress, stream = bars(patience_s=0, terminal=False)
    with progress, progress.task("slow", 2) as task:
        task.advance()
        task.advance()
    assert stream.getvalue() == "slow ...\n"
