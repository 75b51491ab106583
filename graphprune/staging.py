"""A run's output: written aside, and moved to its place together once everything has succeeded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphprune.errors import OutputError
from graphprune.files import prepare_out

__all__ = ["Staging", "staging"]


class Staging:
    """Folder in which a run writes; its files move to their place together, at the end."""

    def __init__(self, path: Path, out: Path | None) -> None:
        self.path = path
        self.out = out

    def deliver(self) -> tuple[Path, ...]:
        """Move every file into `out`, and return where they are now; without `out` there is nothing to keep."""
        if self.out is None:
            return ()
        delivered = []
        for file in sorted(self.path.iterdir()):
            target = self.out / file.name
            try:
                file.replace(target)
            except OSError as error:
                raise OutputError(
                    f"expected to write {str(target)!r}: {error.strerror or error}"
                ) from error
            delivered.append(target)
        return tuple(delivered)


@contextlib.contextmanager
def staging(out: str | Path | None) -> Iterator[Staging]:
    """Yield a folder to write into; after an error nothing of it, nor of a folder made for it, is left."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as name:
            yield Staging(Path(name), None)
        return
    folder = Path(out)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    prepare_out(folder)
    is_delivered = False
    try:
        # inside `out`, so that moving a file is one rename on one file system
        with tempfile.TemporaryDirectory(prefix=".graphprune-", dir=folder) as name:
            yield Staging(Path(name), folder)
        is_delivered = True
    finally:
        if not is_delivered:
            for path in made:
                # somebody else may have put a file there meanwhile
                with contextlib.suppress(OSError):
                    path.rmdir()
