"""A Program as an ONNX file: torch's exporter, then everything taken out that is not the model.

The exporter writes stack traces, node descriptions and the exported signature into the file: machine paths, and a
third of a small model's bytes. They are removed, so that equal programs give equal bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram, default_decompositions
from torch.utils import _pytree as pytree

from graphprune.errors import ExportError
from graphprune.exported import export_program, exporter_quiet, first_line
from graphprune.files import write_atomic
from graphprune.onnx_operators import translations
from graphprune.program import Program

__all__ = ["OnnxFile", "export_onnx", "zipped_bytes"]

# A protobuf message holds less than 2 GiB; the margin is for the graph around the weights.
MAX_SINGLE_FILE_BYTES = 2**31 - 64 * 2**20

_SYMBOL = re.compile(r"\bs\d+\b")


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An ONNX file that was written and checked."""

    path: Path
    """The model file."""
    weights: Path | None
    """The file that holds the weights of a model too large for one file, beside the model file; usually None."""
    num_bytes: int
    """Bytes on disk, both files together."""
    opset: int
    """Version of the default operator set."""
    inputs: tuple[str, ...]
    """Names of the graph inputs."""
    outputs: tuple[str, ...]
    """Names of the graph outputs."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to the model."""
        return (self.path,) if self.weights is None else (self.path, self.weights)


def zipped_bytes(files: Iterable[Path]) -> int:
    """Return how many bytes files take when each is compressed as gzip does."""
    total = 0
    for path in files:
        packer = zlib.compressobj(level=6)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total


def export_onnx(program: Program, path: str | Path, *, opset: int | None = None) -> OnnxFile:
    """Write `program` to `path` as ONNX, check it with onnx's checker, and say what was written.

    The file is whole or absent, and the same program gives the same bytes. Weights go into `path` itself; a model of
    2 GB or more, which one protobuf file cannot hold, gets a second file ``<path>.data``.

    Args:
        program: What to export; inputs keep their names, outputs take the keys of a returned dict.
        path: The file to write; its folder must exist.
        opset: Version of the default operator set; None takes the exporter's own default.

    Raises:
        ExportError: torch.export, torch's ONNX exporter or onnx's checker refused.
        OutputError: The file cannot be written.
    """
    path = Path(path)
    exported = _taken_apart(export_program(program))
    try:
        model = _converted(program, exported, opset, optimize=True)
        weights = _write(model, path)
    except (
        ExportError
    ):  # the exporter's own optimizer can fail, or leave out a node that others read
        model = _converted(program, exported, opset, optimize=False)
        weights = _write(model, path)
    files = [path] if weights is None else [path, weights]
    return OnnxFile(
        path=path,
        weights=weights,
        num_bytes=sum(file.stat().st_size for file in files),
        opset=model.opset_imports[""],
        inputs=tuple(str(value.name) for value in model.graph.inputs),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
    )


def _converted(
    program: Program, exported: ExportedProgram, opset: int | None, *, optimize: bool
) -> ir.Model:
    """Return what torch's exporter makes of a program, without what describes the export."""
    try:
        with exporter_quiet(), _pinned_strides(exported):
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=optimize,
                verbose=False,
                opset_version=opset,
                input_names=_input_names(exported),
                output_names=_output_names(exported),
                custom_translation_table=translations(),
            )
    except Exception as error:
        raise ExportError(
            f"torch's ONNX exporter refused {program.source} (opset {opset or 'default'}): {_innermost(error)}"
        ) from error
    if converted is None:
        raise ExportError(f"torch's ONNX exporter gave no model for {program.source}")
    _hold_padding(converted.model)
    _strip(converted.model)
    return converted.model


def _innermost(error: BaseException) -> str:
    """Return what was wrong in the first place: the exporter's own errors say which of its steps failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DISTANCES = torch.ops.aten.cdist.default


def _taken_apart(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with those operators in parts that the exporter does not know.

    These are distances, attention in more or fewer than four dimensions, and movements of complex numbers.
    """
    table: dict[Any, Any] = {}
    for node in exported.graph.nodes:
        if node.target is _ATTENTION and node.args[0].meta["val"].dim() != 4:
            table[_ATTENTION] = default_decompositions()[_ATTENTION]
        elif node.target is _DISTANCES:
            table[_DISTANCES] = _distances
        elif node.target in _MOVED and node.args[0].meta["val"].is_complex():
            table[node.target] = _MOVED[node.target]
    if not table:
        return exported
    with _pinned_strides(exported):
        decomposed: ExportedProgram = exported.run_decompositions(table)
    return decomposed


def _distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Distances between the rows of two matrices."""
    distances: Tensor = torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, dim=-1)
    return distances


def _moved_as_pairs(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a movement of complex numbers as one of pairs of real ones; of real numbers it is none."""

    def moved(x: Tensor, *args: Any) -> Any:
        return torch.view_as_complex(move(x, *args)) if x.is_complex() else NotImplemented

    return moved


_MOVED: Mapping[Any, Callable[..., Tensor]] = {
    torch.ops.aten.unsqueeze.default: _moved_as_pairs(
        lambda x, dim: torch.view_as_real(x).unsqueeze(dim % (x.dim() + 1))
    ),
    torch.ops.aten.expand.default: _moved_as_pairs(
        lambda x, sizes: torch.view_as_real(x).expand(*sizes, 2)
    ),
    torch.ops.aten.select.int: _moved_as_pairs(
        lambda x, dim, index: torch.view_as_real(x).select(dim % x.dim(), index)
    ),
}
"""Movements that the exporter knows of real numbers alone."""


@contextlib.contextmanager
def _pinned_strides(exported: ExportedProgram) -> Iterator[None]:
    """Make the output of every attention contiguous, for a while.

    The exporter turns a reshape behind it into a view by the strides of the traced kernel's output, then decomposes
    attention into products with other strides, and cannot view those.
    """
    clone, memory = torch.ops.aten.clone.default, {"memory_format": torch.contiguous_format}
    copies = []
    for node in list(exported.graph.nodes):
        if node.target is _ATTENTION:
            with exported.graph.inserting_after(node):
                copy = exported.graph.call_function(clone, (node,), dict(memory))
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(
                copy, delete_user_cb=lambda user, copy=copy: user is not copy
            )
            copies.append(copy)
    try:
        yield
    finally:
        for copy in copies:
            copy.replace_all_uses_with(copy.args[0])
            exported.graph.erase_node(copy)


def _input_names(exported: ExportedProgram) -> list[str]:
    return list(exported.graph_signature.user_inputs)


def _output_names(exported: ExportedProgram) -> list[str]:
    """Name every output after its place: the keys and positions that lead to it, or ``output`` for a bare tensor."""
    outputs = exported.graph_signature.user_outputs
    tree = pytree.tree_unflatten(list(range(len(outputs))), exported.call_spec.out_spec)
    taken = set(_input_names(exported))
    names: list[str] = []
    for keys, _ in pytree.tree_flatten_with_path(tree)[0]:
        parts = [str(_key(key)) for key in keys]
        name = "_".join(parts) or "output"
        if not name.isidentifier() or name in taken:
            name = f"output_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _hold_padding(model: ir.Model) -> None:
    """Put a node that does nothing between a border and the maximum over it.

    ONNX Runtime (1.31) takes a border of zeros into the pooling, whose own border is minus infinity, and so gives other
    answers for negative numbers. A ``Max`` of one value is as good as none, and keeps the two apart.
    """
    for pool in [n for n in model.graph.all_nodes() if n.op_type == "MaxPool"]:
        border = pool.inputs[0]
        source = None if border is None else border.producer()
        if border is None or source is None or source.op_type != "Pad" or source.graph is None:
            continue
        apart = ir.node("Max", [border])
        apart.outputs[0].shape, apart.outputs[0].type = border.shape, border.type
        source.graph.insert_after(source, apart)
        pool.replace_input_with(0, apart.outputs[0])


def _strip(model: ir.Model) -> None:
    """Remove what describes the export and not the model, and call the free batch dimension ``batch``."""
    model.metadata_props.clear()
    model.doc_string = None
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                symbols.setdefault(
                    str(dim.value), "batch" if not symbols else f"batch_{len(symbols)}"
                )
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.doc_string = None
        graph.metadata_props.clear()
        _strip_values((*graph.inputs, *graph.outputs, *graph.initializers.values()), symbols)
        for node in graph.all_nodes():
            node.doc_string = None
            node.metadata_props.clear()
            _strip_values(node.outputs, symbols)


def _strip_values(values: Iterable[ir.Value], symbols: dict[str, str]) -> None:
    for value in values:
        value.doc_string = None
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.doc_string = None
            value.const_value.metadata_props.clear()
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_renamed(dim, symbols) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, symbols: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    return _SYMBOL.sub(lambda match: symbols.get(match.group(), match.group()), str(dim.value))


def _write(model: ir.Model, path: Path) -> Path | None:
    """Write the model and check what was written; return the file of the weights where one was needed."""
    num_bytes = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    if num_bytes < MAX_SINGLE_FILE_BYTES:
        with write_atomic(path) as temporary:
            ir.save(model, temporary, format="protobuf")
            _check(temporary, path)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        return None
    weights = path.with_name(f"{path.name}.data")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        ir.save(model, temporary, format="protobuf", external_data=weights.name)
        _check(temporary, path)
        # The model file comes last: whoever sees it finds its weights.
        os.replace(Path(folder) / weights.name, weights)
        os.replace(temporary, path)
    return weights


def _check(written: Path, path: Path) -> None:
    try:
        onnx.checker.check_model(str(written), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx's checker refused {path.name}: {first_line(error)}") from error
