"""Passes by name: every installed package may add some through the entry point group ``graphprune.passes``.

An entry point maps a name in kebab-case to ``module:Class``. Ours stand in pyproject.toml beside those of third
parties; nothing is imported before its name is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from graphprune.errors import UsageError

if TYPE_CHECKING:
    from graphprune.contract import Pass

__all__ = ["GROUP", "KINDS", "PassInfo", "info", "infos", "load", "methods", "names", "providers"]

GROUP = "graphprune.passes"
"""Name of the entry point group."""

KINDS = ("analysis", "importance", "training", "surgery", "export")
"""What a pass can be, in the order in which a pipeline usually runs them: the folders of graphprune/passes."""


class PassInfo:
    """What the lists of passes show about one pass."""

    def __init__(self, name: str, cls: type[Pass], owner: str) -> None:
        """Describe `cls`, registered under `name` by the distribution `owner`."""
        self.name = name
        self.cls = cls
        self.owner = owner

    @property
    def kind(self) -> str:
        """Folder of the pass, or ``other`` for a third party's pass outside such a folder."""
        folders = [part for part in self.cls.__module__.split(".") if part in KINDS]
        return folders[-1] if folders else "other"

    @property
    def summary(self) -> str:
        """First line of the class docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    @property
    def is_method(self) -> bool:
        """Whether ``--method`` takes this name."""
        return bool(self.cls.is_method)

    @property
    def options(self) -> dict[str, str]:
        """Option name -> type and default as text."""
        return self.cls.describe_options()

    def to_json(self) -> dict[str, object]:
        """Return the description as plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "is_method": self.is_method,
            "options": self.options,
            "owner": self.owner,
            "class": f"{self.cls.__module__}:{self.cls.__qualname__}",
        }


def names() -> tuple[str, ...]:
    """Return the name of every registered pass, sorted."""
    return tuple(sorted(_table()))


def load(name: str) -> type[Pass]:
    """Import the pass registered under `name`.

    Raises:
        UsageError: No such name, or what stands behind it is not a pass of that name.
    """
    table = _table()
    entry = table.get(name)
    if entry is None:
        raise UsageError(_unknown(name, tuple(table)))
    from graphprune.contract import Pass

    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"pass {name!r} of {_owner(entry)} cannot be imported from {entry.value}: {error}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise UsageError(
            f"pass {name!r} of {_owner(entry)}: expected a subclass of graphprune.Pass at {entry.value}, found {cls!r}"
        )
    if cls.name != name:
        raise UsageError(
            f"pass {name!r} of {_owner(entry)}: {entry.value} calls itself {cls.name!r}; register it under that name"
        )
    return cls


def info(name: str) -> PassInfo:
    """Return what the lists show about the pass `name`."""
    return PassInfo(name, load(name), _owner(_table()[name]))


def infos() -> tuple[PassInfo, ...]:
    """Return every registered pass, by kind in pipeline order, then by name."""
    order = {kind: i for i, kind in enumerate(KINDS)}
    return tuple(sorted(map(info, names()), key=lambda i: (order.get(i.kind, len(order)), i.name)))


def methods() -> tuple[str, ...]:
    """Return the names that ``--method`` takes."""
    return tuple(name for name in names() if load(name).is_method)


def providers(kind: type) -> list[str]:
    """Return the registered passes whose ``run`` is annotated to return `kind`, and that do without one themselves."""
    found = []
    for name in names():
        try:
            cls = load(name)
        except (
            UsageError
        ):  # a broken third-party pass must not hide the error that is being written
            continue
        annotation = cls.run.__annotations__.get("return", "")
        is_provider = kind.__name__ == annotation or annotation is kind
        if is_provider and kind not in cls.requires:
            found.append(name)
    return found


def _unknown(name: str, known: tuple[str, ...]) -> str:
    if not known:
        return (
            f"no pass is called {name!r}, and none is registered at all: install graphprune "
            "(for a checkout: pip install -e .)"
        )
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`graphprune passes` lists the names"
    return f"no pass is called {name!r}; {hint}"


def _owner(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown distribution"


def _table() -> Mapping[str, importlib.metadata.EntryPoint]:
    return _scan(tuple(sys.path))


@functools.lru_cache(maxsize=8)
def _scan(path: tuple[str, ...]) -> Mapping[str, importlib.metadata.EntryPoint]:
    """Read the entry points; `path` is the cache key, for what is on sys.path decides what is found."""
    table: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        first = table.setdefault(entry.name, entry)
        if first is not entry:
            raise UsageError(
                f"two passes are called {entry.name!r}: {first.value} of {_owner(first)} and "
                f"{entry.value} of {_owner(entry)}; uninstall one of the two"
            )
    return table
