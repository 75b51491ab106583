"""What a text like ``package.module:name`` names: a function or class of the user's own, or of any library."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphprune.errors import GraphpruneError

__all__ = ["current_folder_importable", "find_callable", "is_name"]

_NAME = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def is_name(text: str) -> bool:
    """Tell whether a text has the form ``package.module:name``."""
    return _NAME.fullmatch(text) is not None


def find_callable(
    what: str, text: str, *, error: type[GraphpruneError], advice: str = ""
) -> Callable[..., Any]:
    """Return the function or class that `text` names, from the current folder or what is installed.

    Args:
        what: What it is for, which begins a message.
        text: ``package.module:name``.
        error: What to raise.
        advice: Ends the message where the module is not there.

    Raises:
        GraphpruneError: The text has another form, or nothing of that name is there; of the class `error`.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise error(f"{what}: expected package.module:name, found {text!r}")
    try:
        with current_folder_importable():
            module = importlib.import_module(match[1])
    except ModuleNotFoundError as missing:
        raise error(f"{what} {text!r}: cannot import {match[1]!r} ({missing}){advice}") from missing
    # The user's own module runs here: whatever it raises belongs to the message.
    except Exception as failure:
        raise error(
            f"{what} {text!r}: importing {match[1]!r} failed: {type(failure).__name__}: {failure}"
        ) from failure
    found = getattr(module, match[2], None)
    if not callable(found):
        raise error(f"{what} {text!r}: module {match[1]!r} has no function or class {match[2]!r}")
    return found  # type: ignore[no-any-return]


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Look in the current folder first for what is imported, until the context ends."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
