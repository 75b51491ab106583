"""Safe unpickling: a model file may name classes of torch, torchvision and timm, and those that the user trusts.

A pickle is a program: it names functions and calls them. Two guards stand here. `scan` runs the pickle with every name
replaced by an inert stand-in, which lists what the file names without importing or calling any of it; then, only if
every name is allowed, `load` runs it for real, with an unpickler that resolves allowed names and nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib
import inspect
import io
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from graphprune.errors import ForbiddenClassError, LoadError

__all__ = ["load", "scan"]

_LEGACY_HEADERS = 3
_BUILTINS = (
    *(set, frozenset, list, dict, tuple, slice, range, object),
    *(int, float, bool, complex, str, bytes, bytearray),
)
_NAMES = frozenset(
    {
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "functools.partial",
        "_codecs.encode",
        "copyreg._reconstructor",
        "torch.Size",
        "torch.device",
        "torch.dtype",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.serialization._get_layout",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        *(
            f"torch._utils._rebuild_{k}"
            for k in ("tensor", "tensor_v2", "parameter", "parameter_with_state")
        ),
        *(f"{m}.{t.__name__}" for m in ("builtins", "__builtin__") for t in _BUILTINS),
        *(
            f"torch.{a}"
            for a in (
                "relu",
                "sigmoid",
                "tanh",
                "softmax",
                "log_softmax",
                "flatten",
                "add",
                "mul",
                "cat",
            )
        ),
        *(
            f"torch._C._nn.{a}"
            for a in ("gelu", "silu", "elu_", "leaky_relu", "hardtanh", "hardswish", "softplus")
        ),
    }
)
_PACKAGES = (
    "torch.nn.",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
)


class _Inert:
    """Stands for anything that a pickle names: takes every call and every state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Scanner(pickle.Unpickler):
    def __init__(self, file: Any, found: dict[str, tuple[str, str]]) -> None:
        super().__init__(file)
        self.found = found

    def find_class(self, module: str, name: str) -> Any:
        self.found[f"{module}.{name}"] = (module, name)
        return _Inert

    def persistent_load(self, saved_id: Any) -> Any:
        # Old files wrap a class, which the pickle goes on to instantiate, with its source; all others are storages.
        return (
            saved_id[1] if isinstance(saved_id, tuple) and saved_id[:1] == ("module",) else _Inert()
        )


def scan(path: Path) -> tuple[tuple[str, str], ...]:
    """Return every (module, name) that the pickle in `path` names, without importing or calling any of them.

    Raises:
        pickle.UnpicklingError: And other errors of the unpickler, for a damaged file.
    """
    found: dict[str, tuple[str, str]] = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    _Scanner(io.BytesIO(archive.read(name)), found).load()
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_HEADERS + 1):
                _Scanner(file, found).load()
    return tuple(found.values())


def load(path: Path, *, trust: Sequence[str] = (), trust_all: bool = False) -> Any:
    """Return the object in a file of `torch.save`, on the CPU.

    Args:
        path: The file.
        trust: Names ``package.module.Class`` that the file may use besides the allow-list.
        trust_all: Whether it may use any name.

    Raises:
        ForbiddenClassError: The file names something else; nothing of the file has been executed.
        LoadError: A class that it names cannot be imported.
    """
    trusted = frozenset(trust)
    if not trust_all:
        forbidden = [f"{m}.{n}" for m, n in scan(path) if not _is_allowed(m, n, trusted)]
        if forbidden:
            flags = " ".join(f"--trust {name}" for name in forbidden)
            raise ForbiddenClassError(
                f"{path} names {', '.join(forbidden)}, which is not among the classes of torch.nn, torchvision and "
                f"timm that a model file may use. Nothing of it was run. If you trust the file: {flags}"
            )

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if not (trust_all or _is_allowed(module, name, trusted)):
                raise ForbiddenClassError(
                    f"{path} names {module}.{name}: pass --trust {module}.{name} if you trust it"
                )
            return _resolve(module, name, path)

    def load_one(file: Any, **options: Any) -> Any:
        return Restricted(file, **options).load()

    module = SimpleNamespace(Unpickler=Restricted, load=load_one, __name__="graphprune.unpickle")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def _is_allowed(module: str, name: str, trusted: frozenset[str]) -> bool:
    full = f"{module}.{name}"
    if full in trusted or full in _NAMES:
        return True
    # A dotted name walks through attributes, and so may leave the module that it starts in.
    if "." in name:
        return False
    if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
        return True
    if module == "torch":
        return isinstance(getattr(torch, name, None), torch.dtype)
    if not module.startswith(_PACKAGES):
        return False
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return True  # it cannot be resolved either; `_resolve` says what to install
    return _is_harmless(value)


def _is_harmless(value: Any) -> bool:
    """Say whether `value` is a layer, plain data of a model library, or an activation function."""
    owner = f"{getattr(value, '__module__', '')}."
    if isinstance(value, type) and owner.startswith(_PACKAGES):
        is_data = dataclasses.is_dataclass(value) or issubclass(value, (enum.Enum, tuple))
        return issubclass(value, nn.Module) or is_data or value is collections.OrderedDict
    return inspect.isfunction(value) and owner == "torch.nn.functional."


def _resolve(module: str, name: str, path: Path) -> Any:
    if module == "__builtin__":
        module = "builtins"
    if module == "__main__":
        raise LoadError(
            f"{path} holds an object of class {name} that was defined in a script (__main__), so that its code cannot "
            "be found. Move the class to a module, or give it as package.module:factory with --weights"
        )
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"{path} needs {module}.{name}, which cannot be imported here: {error}"
        ) from error
    resolved: Callable[..., Any] = value
    return resolved
