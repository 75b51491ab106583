"""Example inputs: from text such as ``1x3x32x32``, from a file, or from what a model states about itself."""

from __future__ import annotations

import inspect
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

from graphprune.calling import is_transformers_model
from graphprune.errors import InputError

__all__ = ["infer_inputs", "parse_inputs"]

_SHAPE = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>[a-z]+\d*)(:(?P<limit>\d+))?)?")
_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<text>.+)")
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


def parse_inputs(texts: str | Sequence[str], *, seed: int = 0) -> Any:
    """Return one tensor per shape, and those of every file: a tuple, or a dict where the texts have names.

    Args:
        texts: ``1x3x32x32``, ``1x16:int64``, ``1x16:int64:30522`` (integers below 30522), or a file (``.pt``,
            ``.npy``, ``.npz``, ``.safetensors``); several for several inputs. ``input_ids=1x16:int64:30522`` names the
            parameter that the model takes it as.
        seed: Floating inputs are standard normal from this seed; integers are below the limit, zero without one;
            boolean ones are False.

    Raises:
        InputError: A text is neither a shape nor a readable file of tensors, or only some have names.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        given = _NAMED.fullmatch(text.strip())
        found = _parse_one(text if given is None else given["text"], generator)
        if given is None:
            tensors += found
        elif len(found) == 1 and given["name"] not in named:
            named[given["name"]] = found[0]
        else:
            raise InputError(
                f"input {text!r} gives {given['name']} {len(found)} tensors, or once more: expected one tensor each"
            )
    if named and tensors:
        raise InputError(
            f"only {', '.join(named)} have names: expected all inputs to have one, or none"
        )
    return named or tuple(tensors)


def _parse_one(text: str, generator: torch.Generator) -> list[Tensor]:
    match = _SHAPE.fullmatch(text.strip())
    if match is not None:
        limit = None if match["limit"] is None else int(match["limit"])
        return [_random(text, match["shape"], match["dtype"], limit, generator)]
    if Path(text).suffix.lower() in _FILES:
        return _read(Path(text))
    raise InputError(
        f"input {text!r} is neither a shape such as 1x3x224x224 or 1x16:int64, nor a file ({', '.join(_FILES)})"
    )


def _random(
    text: str,
    shape: str,
    dtype_name: str | None,
    limit: int | None,
    generator: torch.Generator,
) -> Tensor:
    sizes = [int(size) for size in shape.split("x")]
    if 0 in sizes:
        raise InputError(f"input {text!r} has a size of 0: every size must be at least 1")
    dtype = _DTYPES.get(dtype_name or "float32")
    if dtype is None:
        raise InputError(
            f"input {text!r} has the unknown type {dtype_name!r}: expected one of {', '.join(_DTYPES)}"
        )
    if limit is not None and (dtype.is_floating_point or dtype == torch.bool or limit < 1):
        raise InputError(
            f"input {text!r} has the limit {limit}: expected one of at least 1, of an integer type"
        )
    if limit is not None:
        return torch.randint(0, limit, sizes, dtype=dtype, generator=generator)
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


def infer_inputs(model: nn.Module) -> Any:
    """Return the inputs that a torchvision, timm or transformers model was made for.

    Returns:
        A tuple of tensors, a dict from parameter names to tensors for a model of transformers, None for any other.
    """
    if is_transformers_model(model):
        return _transformers_inputs(model)
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
    elif family.startswith("torchvision.models.detection"):
        shape = (3, 320, 320)  # one image
    elif family.startswith("torchvision.models"):
        size = getattr(model, "image_size", 224)
        shape = (1, 3, size, size) if isinstance(size, int) else (1, 3, 224, 224)
    if shape is None:
        return None
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


TOKENS = 16
"""Length of the text that a language model is captured with; its masks and positions are computed for it."""


def _transformers_inputs(model: Any) -> dict[str, Tensor] | None:
    """Return what the configuration says of a model's inputs, or None where it says too little."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    accepted = inspect.signature(model.forward).parameters

    def tokens(vocabulary: int) -> Tensor:
        return torch.randint(0, vocabulary, (1, TOKENS), generator=generator)

    found: dict[str, Tensor] = {}
    for name in ("input_ids", "pixel_values", "input_features", "input_values"):
        if name not in accepted:
            continue
        part = {"input_ids": "text_config", "pixel_values": "vision_config"}.get(name, "")
        settings = getattr(config, part, config)
        if name == "input_ids" and getattr(settings, "vocab_size", None):
            found[name] = tokens(settings.vocab_size)
        elif name == "pixel_values":
            size = getattr(settings, "image_size", None) or 224
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            channels = getattr(settings, "num_channels", 3)
            found[name] = torch.randn(1, channels, height, width, generator=generator)
        elif name == "input_features" and getattr(settings, "max_source_positions", None):
            frames = 2 * settings.max_source_positions
            found[name] = torch.randn(1, settings.num_mel_bins, frames, generator=generator)
        elif name == "input_values" and hasattr(settings, "conv_stride"):
            found[name] = torch.randn(1, SAMPLES, generator=generator)
    if found and config.is_encoder_decoder and "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = tokens(config.vocab_size)
    return found or None


SAMPLES = 16000
"""Samples of the sound that a model of waveforms is captured with: one second, for most."""
