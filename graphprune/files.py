"""Output files that are whole or absent: a crash, a full disk or a failed check never leaves half of one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import OutputError

__all__ = ["json_line", "prepare_out", "write_atomic"]


def json_line(values: Mapping[str, Any]) -> str:
    """Return a JSON object in one line; JSON has no word for a number that is none, and says null."""
    return json.dumps(
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    )


@contextlib.contextmanager
def write_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the place of `path`.

    After a failure inside the block the temporary file is gone and `path` is as it was before.

    Args:
        path: The file to write; its folder must exist.

    Raises:
        OutputError: The folder or the file cannot be written.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error
    temporary = Path(name)
    try:
        yield temporary
        try:
            _sync(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _sync(path.parent)
        except OSError as error:
            raise OutputError(_cannot_write(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare_out(folder: str | Path) -> Path:
    """Create `folder` where it is missing, check that files can be written there, and return it.

    Raises:
        OutputError: It is not a folder, cannot be created, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"graphprune")
    except OSError as error:
        raise OutputError(
            f"expected an output folder that can be written, found {str(folder)!r}: "
            f"{error.strerror or error}; choose another with --out"
        ) from error
    return folder


def _cannot_write(path: Path, error: OSError) -> str:
    return f"expected to write {str(path)!r}: {error.strerror or error}; choose another folder with --out"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # The umask can only be read by setting it; mkstemp's own mode (0600) would hide the file from other users.
    mask = os.umask(0)
    os.umask(mask)
    return mask
