"""Many models, one after the other, in a process of their own.

A worker takes models from a queue until it has grown large, has died, or has taken too long over one; then the next one
starts. So a crash or a lack of memory is a row, and not the end of the run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing as mp
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from graphprune.errors import OutputError
from graphprune.zoo.models import ZooModel
from graphprune.zoo.row import Job, Row, run_model, warm_up

__all__ = ["load_rows", "run_suite"]

FRESH_GIB = 3.0
"""A worker that has needed more memory than this is replaced."""
_LEAVE_S = 5.0
"""How long a worker gets to leave by itself."""


def load_rows(path: Path) -> dict[str, Row]:
    """Return the rows of a file of JSON lines by model, the last one of each; none where there is no file.

    A last line without an end was being written when the run was killed, and is left out.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [Row.from_json(json.loads(line)) for line in lines if line.endswith("\n")]
    return {row.model: row for row in whole}


def run_suite(
    models: Sequence[ZooModel],
    job: Job,
    *,
    done: Sequence[Row] = (),
    log: Path | None = None,
    timeout_s: float = 900.0,
    threads: int = 2,
    notify: Callable[[Row, Sequence[Row]], None] = lambda row, rows: None,
) -> list[Row]:
    """Run every model that `done` does not hold with the same job and a good end, and return all rows in order.

    Args:
        models: What to run.
        job: What to do with each.
        done: Rows of an earlier run.
        log: File to append every new row to, as a JSON line, as soon as it is there.
        timeout_s: Seconds after which a model is given up.
        threads: Threads of each worker.
        notify: Called with every new row, and all rows so far.

    Raises:
        OutputError: `log` cannot be written.
    """
    shapes = {m.name: m.input_text for m in models}
    rows = {
        r.model: r for r in done if r.passed and r.job == job and shapes.get(r.model) == r.input
    }

    def ordered() -> list[Row]:
        return [rows[m.name] for m in models if m.name in rows]

    with _Worker(threads=threads, timeout_s=timeout_s) as worker:
        for model in models:
            if model.name in rows:
                continue
            row = rows[model.name] = worker.run(model, job)
            if log is not None:
                _append(log, row)
            notify(row, ordered())
    return ordered()


def _append(path: Path, row: Row) -> None:
    """Add a line; what a killed run left of a line goes."""
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row.to_json(), allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise OutputError(f"cannot write rows to {str(path)!r}: {error.strerror}") from error


class _Worker:
    """A process that runs models; replaced when it must be."""

    def __init__(self, *, threads: int, timeout_s: float) -> None:
        self.threads = threads
        self.timeout_s = timeout_s
        self.process: Any = None
        self.connection: Connection[Any, Any] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def run(self, model: ZooModel, job: Job) -> Row:
        """Return the row of one model, whatever happens to the process."""
        connection = self.connection or self.start()
        started = time.perf_counter()
        connection.send((model, job))
        failure = f"given up after {self.timeout_s:.0f} s"
        try:
            if connection.poll(self.timeout_s):
                row: Row = connection.recv()
                if (row.memory_gib or 0.0) > FRESH_GIB:
                    self.stop()
                return row
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            failure = f"the process died with exit code {code}"
            if code == -9:
                failure += " (killed, as a system short of memory does)"
        self.stop()
        return Row(
            model=model.name,
            kind=model.kind,
            input=model.input_text,
            job=job,
            seconds={"all": time.perf_counter() - started},
            failure=failure,
        )

    def start(self) -> Connection[Any, Any]:
        """Start a process and wait until it is ready."""
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()
        return self.connection

    def stop(self) -> None:
        """End the process: it leaves by itself when the connection closes, unless it is busy."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.join(_LEAVE_S)
            self.process.kill()
            self.process.join()
            self.process.close()
        self.process = self.connection = None


def _serve(connection: Connection[Any, Any], threads: int) -> None:
    """Run models until the other side closes; what libraries print must not mix with the table."""
    warnings.simplefilter("ignore")
    for name in ("torch", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    warm_up()
    connection.send("ready")
    while True:
        try:
            model, job = connection.recv()
        except EOFError:
            return
        connection.send(run_model(model, job))


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone, however it went."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
