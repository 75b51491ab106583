"""Example inputs: from text such as ``1x3x32x32``, from a file, or from what a model states about itself."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.errors import InputError

__all__ = ["infer_inputs", "parse_inputs"]

_SHAPE = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>[a-z]+\d*))?")
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_FILES = (".pt", ".pth", ".npy", ".npz", ".safetensors")


def parse_inputs(texts: str | Sequence[str], *, seed: int = 0) -> tuple[Tensor, ...]:
    """Return one tensor per shape, and those of every file.

    Args:
        texts: ``1x3x32x32``, ``1x16:int64``, or a file (``.pt``, ``.npy``, ``.npz``, ``.safetensors``); several for
            several inputs.
        seed: Floating inputs are standard normal from this seed; integer and boolean ones are zero.

    Raises:
        InputError: A text is neither a shape nor a readable file of tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    for text in [texts] if isinstance(texts, str) else texts:
        match = _SHAPE.fullmatch(text.strip())
        if match is not None:
            tensors.append(_random(text, match["shape"], match["dtype"], generator))
        elif Path(text).suffix.lower() in _FILES:
            tensors += _read(Path(text))
        else:
            raise InputError(
                f"input {text!r} is neither a shape such as 1x3x224x224 or 1x16:int64, nor a file ({', '.join(_FILES)})"
            )
    return tuple(tensors)


def _random(text: str, shape: str, dtype_name: str | None, generator: torch.Generator) -> Tensor:
    sizes = [int(size) for size in shape.split("x")]
    if 0 in sizes:
        raise InputError(f"input {text!r} has a size of 0: every size must be at least 1")
    dtype = _DTYPES.get(dtype_name or "float32")
    if dtype is None:
        raise InputError(
            f"input {text!r} has the unknown type {dtype_name!r}: expected one of {', '.join(_DTYPES)}"
        )
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.zeros(sizes, dtype=dtype)


def _read(path: Path) -> list[Tensor]:
    if not path.is_file():
        raise InputError(f"input file {path} does not exist")
    try:
        tensors = _READERS[path.suffix.lower()](path)
    # torch, numpy and safetensors raise different classes for a damaged file.
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"input file {path} cannot be read as tensors: {reason}") from error
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise InputError(
            f"input file {path} holds {type(tensors).__name__}, expected a tensor or a tuple of tensors"
        )
    return tensors


def _read_torch(path: Path) -> list[Any]:
    value: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read_npy(path: Path) -> list[Any]:
    return [torch.from_numpy(np.ascontiguousarray(np.load(path, allow_pickle=False)))]


def _read_npz(path: Path) -> list[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return [torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files]


def _read_safetensors(path: Path) -> list[Any]:
    return list(load_file(path).values())


_READERS = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def infer_inputs(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Return the inputs that a torchvision or timm model was made for, or None for any other model."""
    family = type(model).__module__
    shape: tuple[int, ...] | None = None
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        shape = (1, *config["input_size"])
    elif family.startswith("torchvision.models.video"):
        shape = (
            (1, 3, 16, 224, 224)
            if family.endswith(("mvit", "swin_transformer", "s3d"))
            else (1, 3, 16, 112, 112)
        )
    elif family.startswith("torchvision.models.inception"):
        shape = (1, 3, 299, 299)
    elif family.startswith("torchvision.models"):
        size = getattr(model, "image_size", 224)
        shape = (1, 3, size, size) if isinstance(size, int) else (1, 3, 224, 224)
    if shape is None:
        return None
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
