"""Loading: a MODEL text becomes a module, and a weight file becomes its parameters.

MODEL is ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, or a file: ``.pt2`` of `torch.export`, or
``.pt``/``.pth`` with a pickled module, a GraphModule or a TorchScript archive.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphprune import unpickle
from graphprune.errors import GraphpruneError, LoadError
from graphprune.named import current_folder_importable

__all__ = ["ScriptedModel", "is_onnx", "load_model", "load_weights", "read_weights"]

_SHOWN = 4
_SEED = 0
_FILES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors", ".onnx")
_FORMS = "expected a file (.pt, .pth, .pt2, .onnx), torchvision:NAME, timm:NAME or package.module:factory"
_DAMAGED = (
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OSError,
    ImportError,
)


def is_onnx(text: str) -> bool:
    """Say whether a MODEL text is an ONNX file; one that is not readable as a file is refused.

    Raises:
        LoadError: The file is missing, empty or not readable.
    """
    if Path(text).suffix.lower() != ".onnx":
        return False
    _check_readable(Path(text))
    return True


def load_model(
    text: str,
    *,
    weights: str | Path | None = None,
    trust: Sequence[str] = (),
    trust_all: bool = False,
) -> nn.Module | ExportedProgram:
    """Return the model that a MODEL text names; random weights come from a fixed seed.

    Args:
        text: A file, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        weights: A state dict to load into the model.
        trust: Classes that a pickle may name besides those of torch, torchvision and timm.
        trust_all: Whether a pickle may name any class.

    Raises:
        LoadError: The text names nothing, or what it names is not a model.
        ForbiddenClassError: A pickle names a class that is not allowed.
    """
    prefix, separator, name = text.partition(":")
    if text.endswith(".py"):
        raise LoadError(
            f"{text} is code, not a model; name a function of it that returns one: "
            f"{Path(text).with_suffix('').as_posix().replace('/', '.')}:FUNCTION"
        )
    is_file = Path(text).suffix.lower() in _FILES or Path(text).exists()
    with current_folder_importable():
        if separator and prefix in _ZOOS and not is_file:
            with _seeded():
                model: Any = _ZOOS[prefix](name)
        elif is_file or not separator:
            model = _load_file(Path(text), trust=trust, trust_all=trust_all)
        else:
            model = _call_factory(prefix, name)
    if weights is None:
        return model  # type: ignore[no-any-return]
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"{text} is an exported program, which holds its weights: leave out --weights {weights}"
        )
    return load_weights(model, weights, in_place=True)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def _from_torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise LoadError(f"torchvision:{name} needs torchvision: pip install torchvision") from error
    if name not in models.list_models():
        raise LoadError(f"torchvision has no model {name!r}{_close(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # Some builders fetch a backbone or warn about slow initialisation unless told.
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model: nn.Module = models.get_model(name, **options)
    return model


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise LoadError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {name!r}{_close(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    if not isinstance(model, nn.Module):
        raise LoadError(f"timm:{name} is a {type(model).__name__}, expected a module")
    return model


_ZOOS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _close(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=3)
    return f": did you mean {', '.join(matches)}?" if matches else ""


def _call_factory(module_name: str, name: str) -> nn.Module:
    where = f"{module_name}:{name}"
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        plain = f" (write {module_name[:-3]}:{name})" if module_name.endswith(".py") else ""
        raise LoadError(
            f"{where}: there is no module {error.name!r} here or installed{plain}; {_FORMS}"
        ) from error
    # The user's own module runs here: whatever it raises belongs to the message.
    except Exception as error:
        raise LoadError(
            f"{where}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise LoadError(
                f"{where}: {module_name} has no attribute {name!r}{_close(part, public)}"
            )
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            with _seeded():
                found = found()
        except GraphpruneError:
            raise
        except Exception as error:
            raise LoadError(f"{where}: the call failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise LoadError(
            f"{where} is a {type(found).__name__}, expected a torch.nn.Module or a function that makes one"
        )
    return found


def _load_file(path: Path, *, trust: Sequence[str], trust_all: bool) -> nn.Module | ExportedProgram:
    if path.suffix.lower() not in _FILES and not path.exists():
        raise LoadError(f"{path} is not a model and no such file exists; {_FORMS}")
    _check_readable(path)
    if path.suffix.lower() == ".safetensors":
        raise LoadError(_only_weights(path))
    if not zipfile.is_zipfile(path):
        return _load_pickle(path, trust=trust, trust_all=trust_all)
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if (
        path.suffix.lower() == ".pt2"
        or "archive_format" in names
        or "serialized_exported_program.json" in names
    ):
        return _load_exported(path)
    if "constants.pkl" in names:
        return _load_scripted(path)
    return _load_pickle(path, trust=trust, trust_all=trust_all)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise LoadError(f"{path} is a folder, expected a model file")
    if not path.exists():
        raise LoadError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise LoadError(f"{path} is empty, expected a model file")


def _load_exported(path: Path) -> ExportedProgram:
    try:
        _register_operators(path)
        return torch.export.load(path)
    except GraphpruneError:
        raise
    except (*_DAMAGED, AssertionError) as error:
        raise LoadError(
            f"{path} is not a readable file of torch.export.save: {_first_line(error)}"
        ) from error


_LIBRARIES = {"torchvision": "torchvision", "transformers": "transformers.integrations.moe"}
"""Namespace of operators -> the module whose import registers them."""
_OPERATOR = re.compile(rb"torch\.ops\.(\w+)\.(\w+)")


def _register_operators(path: Path) -> None:
    """Import what registers the operators of a file, where they are not torch's own."""
    with zipfile.ZipFile(path) as archive:
        graphs = [n for n in archive.namelist() if n.endswith(".json")]
        found = {match for n in graphs for match in _OPERATOR.findall(archive.read(n))}
    for space, operator in sorted((a.decode(), b.decode()) for a, b in found):
        if hasattr(getattr(torch.ops, space), operator):
            continue
        if space in _LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(_LIBRARIES[space])
        if not hasattr(getattr(torch.ops, space), operator):
            advice = (
                f"pip install {space}"
                if space in _LIBRARIES
                else "import the module that registers it, from Python, before this file is read"
            )
            raise LoadError(
                f"{path} calls the operator {space}::{operator}, which nothing here registers; {advice}"
            )


def _load_scripted(path: Path) -> nn.Module:
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except _DAMAGED as error:
        raise LoadError(f"{path} is a damaged TorchScript archive: {_first_line(error)}") from error
    return ScriptedModel(module)


class ScriptedModel(nn.Module):
    """A TorchScript module as a plain one, which `torch.export` can trace by running it."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        # A loaded archive holds plain tensors where the exporter insists on parameters.
        self._held = [_hold_parameters(part) for part in script.modules()]
        self.script = script

    def forward(self, *inputs: Tensor) -> Any:
        """Run the TorchScript module."""
        return self.script(*inputs)


def _hold_parameters(script: nn.Module) -> list[nn.Parameter]:
    """Replace the direct parameters of a TorchScript module by true ones; they live as long as the result is kept."""
    held = {
        name: nn.Parameter(tensor.detach())
        for name, tensor in script.named_parameters(recurse=False)
    }
    for name, parameter in held.items():
        setattr(script, name, parameter)
    return list(held.values())


def _load_pickle(path: Path, *, trust: Sequence[str], trust_all: bool) -> nn.Module:
    try:
        value = unpickle.load(path, trust=trust, trust_all=trust_all)
    except GraphpruneError:
        raise
    except (*_DAMAGED, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise LoadError(
            f"{path} is not a readable PyTorch model file (truncated, or of another format): {_first_line(error)}"
        ) from error
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Mapping):
        raise LoadError(_only_weights(path))
    raise LoadError(f"{path} holds a {type(value).__name__}, expected a torch.nn.Module")


def _only_weights(path: Path) -> str:
    return (
        f"{path} holds weights without the code of a model. Name the code and load them into it: "
        f"package.module:factory --weights {path}"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a ``.safetensors`` file or a ``.pt`` file; no code of the file runs.

    Raises:
        LoadError: The file is missing, damaged, or holds something else.
    """
    path = Path(path)
    _check_readable(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"weights {path} cannot be read as a state dict: the file holds other objects than tensors. A whole model "
            "goes in the place of MODEL; of its own weights, save model.state_dict()"
        ) from error
    except (*_DAMAGED, SafetensorError) as error:
        raise LoadError(
            f"weights {path} cannot be read as a state dict: {_first_line(error)}"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(t, Tensor) for t in value.values())
    ):
        raise LoadError(
            f"weights {path} hold a {type(value).__name__}, expected a state dict of names and tensors"
        )
    state = {str(name): tensor for name, tensor in value.items()}
    if all(name.startswith("module.") for name in state):  # saved from DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def load_weights(model: nn.Module, path: str | Path, *, in_place: bool = False) -> nn.Module:
    """Return a copy of `model` (itself with `in_place`) with the weights of a file.

    Raises:
        LoadError: Names or shapes differ; the message lists the first of each kind.
    """
    state = read_weights(path)
    own = model.state_dict()
    # A counter that only training reads; old files do not hold it.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    shapes = [
        f"{n} (model {_size(own[n])}, file {_size(state[n])})"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    if any(names for _, names in problems):
        text = "; ".join(
            f"{len(names)} {kind}: {_list(names)}" for kind, names in problems if names
        )
        raise LoadError(f"weights {path} do not fit {type(model).__name__}: {text}")
    if not in_place:
        model = copy.deepcopy(model)
    model.load_state_dict(state, strict=False)
    return model


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
