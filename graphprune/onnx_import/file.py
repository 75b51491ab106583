"""An ONNX file: read, checked, and its local functions written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import inliner, numpy_helper
from torch import Tensor

from graphprune.errors import InputError, LoadError

__all__ = ["InputSpec", "OnnxModel", "example_inputs", "read_onnx", "to_tensor"]

_DOMAINS = ("", "ai.onnx")
_HINT = "give its size with --input, such as --input 1x16:int64 (one for each input)"


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]
    """Sizes; a name or None where any size goes."""

    @property
    def is_batched(self) -> bool:
        """Whether dim 0 is free."""
        return bool(self.shape) and not isinstance(self.shape[0], int)

    def __str__(self) -> str:
        """Return ``name [batch, 3, 224, 224]``."""
        sizes = ", ".join("?" if s is None else str(s) for s in self.shape)
        return f"{self.name} [{sizes}] {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """What a file holds."""

    path: Path
    graph: onnx.GraphProto
    opset: int
    """Version of the default operator set."""
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Tensor]
    """Initializers by name."""


def read_onnx(path: str | Path) -> OnnxModel:
    """Read a file with its external data, check it, and write out its local functions.

    Raises:
        LoadError: The file is missing, damaged, lacks its external data, or uses operators of a foreign domain.
    """
    path = Path(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise LoadError(
            f"{path} is not a readable ONNX file (truncated, or of another format): {_first_line(error)}"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise LoadError(f"{path} holds no ONNX graph (truncated, or of another format)")
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise LoadError(
            f"{path} keeps weights in a second file that cannot be read; put it beside the model: {_first_line(error)}"
        ) from error
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        if "exceeds maximum protobuf size" not in str(error):
            raise LoadError(f"onnx's checker refused {path}: {_first_line(error)}") from error
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    versions = {one.domain: one.version for one in proto.opset_import}
    foreign = {n.domain for n in proto.graph.node} - set(_DOMAINS)
    if foreign:
        found = sorted(f"{n.domain}::{n.op_type}" for n in proto.graph.node if n.domain in foreign)
        raise LoadError(
            f"{path} uses operators of other domains than ONNX's own, which cannot be imported: "
            f"{', '.join(dict.fromkeys(found))}. Export the model without runtime-specific optimisation"
        )
    weights = {one.name: to_tensor(one) for one in proto.graph.initializer}
    if proto.graph.sparse_initializer:
        raise LoadError(f"{path} holds sparse initializers, which cannot be imported")
    return OnnxModel(
        path=path,
        graph=proto.graph,
        opset=versions.get("", versions.get("ai.onnx", 1)),
        inputs=tuple(_spec(v, path) for v in proto.graph.input if v.name not in weights),
        outputs=tuple(v.name for v in proto.graph.output),
        weights=weights,
    )


def to_tensor(proto: onnx.TensorProto) -> Tensor:
    """Return a tensor that owns its memory."""
    array = numpy_helper.to_array(proto)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def example_inputs(
    model: OnnxModel, given: Sequence[Tensor] | None, rows: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """Return inputs of the file's own signature: those that were given, once checked, else one random sample.

    Args:
        model: The file.
        given: What the user gave, or None.
        rows: For each input the number of rows of the table that it picks from, 1 for none: integers stay below it.

    Raises:
        InputError: The inputs do not fit, or the file leaves a size open that nobody gave.
    """
    signature = "; ".join(map(str, model.inputs))
    if given is not None:
        if len(given) != len(model.inputs):
            raise InputError(
                f"{model.path} takes {len(model.inputs)} inputs ({signature}), found {len(given)}"
            )
        for spec, tensor in zip(model.inputs, given, strict=True):
            fits = len(spec.shape) == tensor.dim() and all(
                not isinstance(s, int) or s == n
                for s, n in zip(spec.shape, tensor.shape, strict=True)
            )
            if not fits or spec.dtype != tensor.dtype:
                found = "x".join(map(str, tensor.shape))
                kind = str(tensor.dtype).removeprefix("torch.")
                raise InputError(f"{model.path} takes {spec}, found {found} {kind}")
        return tuple(given)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for position, spec in enumerate(model.inputs):
        sizes = [1 if i == 0 and not isinstance(s, int) else s for i, s in enumerate(spec.shape)]
        if not all(isinstance(s, int) for s in sizes):
            raise InputError(f"{model.path} leaves sizes of its input open: {spec}; {_HINT}")
        shape: list[int] = [s for s in sizes if isinstance(s, int)]
        if spec.dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            limit = rows[position] if rows else 1
            inputs.append(torch.randint(0, limit, shape, generator=generator).to(spec.dtype))
    return tuple(inputs)


def _spec(value: onnx.ValueInfoProto, path: Path) -> InputSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise LoadError(
            f"{path}: input {value.name} is no tensor of known rank, which cannot be imported"
        )
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None)
        for d in kind.shape.dim
    )
    return InputSpec(name=value.name, dtype=_dtype(kind.elem_type, value.name, path), shape=shape)


def _dtype(code: int, name: str, path: Path) -> torch.dtype:
    if code == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16
    try:
        array = np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(code))
        return torch.from_numpy(array).dtype
    except (KeyError, TypeError, ValueError) as error:
        kind = onnx.TensorProto.DataType.Name(code)
        raise LoadError(
            f"{path}: input {name} is of type {kind}, which cannot be imported"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
