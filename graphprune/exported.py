"""torch.export of a Program, done once per program however many export passes ask for it.

Stack traces are removed from the result: they hold paths of the machine, and equal programs must give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphprune.errors import ExportError
from graphprune.program import Program

__all__ = ["export_program", "exporter_quiet", "first_line", "flat_outputs", "without_fast_path"]

# torch.export specialises a dimension of size 0 or 1, so a batch that shall stay free must be traced with 2 or more.
_TRACED_BATCH = 2

_PATHS_IN_META = ("stack_trace", "from_node")


@dataclass(frozen=True)
class _Entry:
    key: tuple[Any, ...]
    exported: ExportedProgram


_CACHE: weakref.WeakKeyDictionary[fx.GraphModule, _Entry] = weakref.WeakKeyDictionary()


def export_program(program: Program) -> ExportedProgram:
    """Return the program as torch.export sees it, with a free batch dimension where the program has one.

    The result shares parameters and buffers with the program, and is shared between callers: do not change it.

    Raises:
        ExportError: torch.export refused; the message quotes its own first line.
    """
    key = _state_of(program)
    entry = _CACHE.get(program.module)
    if entry is None or entry.key != key:
        entry = _Entry(key, _export(program))
        _CACHE[program.module] = entry
    return entry.exported


def flat_outputs(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return every tensor of a model's output, in the order of its pytree."""
    return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says anything, or the error's class where none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextlib.contextmanager
def exporter_quiet() -> Iterator[None]:
    """Keep what torch's exporters print, warn and log away from the user; their errors still come through."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Run attention modules op by op, as exporters trace them, not through the fused inference kernel."""
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)


def _export(program: Program) -> ExportedProgram:
    batch = Dim("batch")
    inputs = program.batch(_TRACED_BATCH)
    shapes = tuple({0: batch} if program.dynamic_batch and t.dim() else None for t in inputs)
    try:
        # Without gradients a part of a tensor may be written to, as in inference.
        with torch.no_grad(), exporter_quiet(), without_fast_path():
            exported = torch.export.export(
                program.module, inputs, dynamic_shapes=shapes if program.dynamic_batch else None
            )
    except Exception as error:
        raise ExportError(
            f"torch.export refused {program.source} "
            f"({'dynamic' if program.dynamic_batch else 'fixed'} batch, inputs "
            f"{[list(t.shape) for t in inputs]}): {first_line(error)}"
        ) from error
    for module in exported.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for name in _PATHS_IN_META:
                    node.meta.pop(name, None)
    return exported


def _state_of(program: Program) -> tuple[Any, ...]:
    # The cached export holds the tensors, so their ids cannot be given to others while the entry lives.
    tensors = tuple((name, id(tensor)) for name, tensor in program.named_tensors())
    inputs = tuple((tuple(t.shape), t.dtype) for t in program.example_inputs)
    return str(program.module.graph), tensors, inputs, program.dynamic_batch
