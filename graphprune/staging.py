"""A run's output: written aside, and moved to its place together once everything has succeeded."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphprune.checkpoint import MEASURED
from graphprune.devices import is_main_process
from graphprune.errors import OutputError, UsageError
from graphprune.files import prepare_out

__all__ = ["CHECKPOINTS", "Staging", "staging"]


CHECKPOINTS = "checkpoints"
"""Folder in `out` for the state of training passes: it outlives an interrupted run, and goes when one is complete."""

_PREFIX = ".graphprune-"


class Staging:
    """Folder in which a run writes; its files move to their place together, at the end."""

    def __init__(self, path: Path, out: Path | None, *, resume: bool = False) -> None:
        self.path = path
        self.out = out
        self.resume = resume
        self.is_main = is_main_process()

    @property
    def checkpoints(self) -> Path | None:
        """Where training passes keep their state; without `out` there is no such place."""
        return None if self.out is None else self.out / CHECKPOINTS

    def deliver(self) -> tuple[Path, ...]:
        """Move every file into `out`, and return where they are now; without `out` there is nothing to keep.

        The run is complete then, and what training passes kept is removed. Of several processes the first one delivers.
        """
        if self.out is None or not self.is_main:
            return ()
        delivered = []
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            target = self.out / file.relative_to(self.path)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            except OSError as error:
                raise OutputError(
                    f"expected to write {str(target)!r}: {error.strerror or error}"
                ) from error
            delivered.append(target)
        shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
        return tuple(delivered)


@contextlib.contextmanager
def staging(out: str | Path | None, *, resume: bool = False) -> Iterator[Staging]:
    """Yield a folder to write into; after an error nothing of it, nor of a folder made for it, is left.

    What stays is the state of a training that was under way, and what was measured for it, for a run with `resume` to
    go on from.

    Raises:
        UsageError: There is no folder to resume in.
        OutputError: The folder cannot be written.
    """
    if out is None:
        if resume:
            raise UsageError("resume= goes on with a run into a folder; give that folder as out=")
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
            yield Staging(Path(name), None)
        return
    folder = Path(out)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    prepare_out(folder)
    if resume:
        # a run that was killed could not take its folder away
        for leftover in folder.glob(f"{_PREFIX}*") if is_main_process() else ():
            shutil.rmtree(leftover, ignore_errors=True)
    is_delivered = False
    try:
        # inside `out`, so that moving a file is one rename on one file system
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as name:
            yield Staging(Path(name), folder, resume=resume)
        is_delivered = True
    finally:
        if not is_delivered:
            _forget_unless_trained(folder / CHECKPOINTS)
            for path in made:
                # somebody else may have put a file there meanwhile
                with contextlib.suppress(OSError):
                    path.rmdir()


def _forget_unless_trained(checkpoints: Path) -> None:
    """Remove what was measured for a training that has no state yet: a run that starts over measures anew."""
    files = (path for path in checkpoints.rglob("*") if path.is_file())
    if is_main_process() and all(path.name == MEASURED for path in files):
        shutil.rmtree(checkpoints, ignore_errors=True)
