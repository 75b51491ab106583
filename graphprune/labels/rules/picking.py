"""Picking along a dimension: slices, single indices, splits; the label is sliced as the data is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.labels.field import Field, Fields
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []


def _picked(trace: Trace, x: Tensor, dim: int, index: slice) -> Tensor:
    """Return a slice of `x` along `dim`."""
    size = len(range(*index.indices(x.shape[dim])))
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    if size == x.shape[dim]:
        return trace.new(shape, x, trace.fields(x))
    fields = []
    for field in trace.fields(x):
        if dim not in field.dims:
            fields.append(field)
            continue
        if not size:  # nothing of it is there
            continue
        axis = field.dims.index(dim)
        if index.step not in (None, 1):
            _tie_steps(trace, field, axis, index.step)
        atoms = field.atoms[(slice(None),) * axis + (index,)]
        if size > 1:
            fields.append(Field(field.dims, atoms))
        else:
            fields.extend(_without_axis(trace, Field(field.dims, atoms), axis))
    return trace.new(shape, x, tuple(fields))


def _tie_steps(trace: Trace, field: Field, axis: int, step: int) -> None:
    """Let runs of `step` neighbours go together only, so that every step lands where it did among what is left."""
    size = field.atoms.shape[axis]
    for offset in range(1, step):
        later = field.atoms.take(range(offset, size, step), axis=axis)
        first = field.atoms.take(range(0, size, step), axis=axis)
        trace.unify(first.take(range(later.shape[axis]), axis=axis), later)


def _without_axis(trace: Trace, field: Field, axis: int) -> Fields:
    """Return `field`, whose `axis` has size one, without it: the one index that is left must stay."""
    trace.fix(field, field.dims[axis], "a single index of this dimension is used")
    dims = field.dims[:axis] + field.dims[axis + 1 :]
    return (Field(dims, field.atoms.squeeze(axis)),) if dims else ()


@rule("slice", "narrow")
def slice_(trace: Trace, call: Call) -> Any:
    """Take a range of a dimension."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    dim = call.arg(1, "dim", 0) % x.dim()
    start, third = call.arg(2, "start"), call.arg(3, "end", call.kwargs.get("length"))
    if call.func._schema.name == "aten::narrow":
        start = int(start) % x.shape[dim] if x.shape[dim] else 0
        return _picked(trace, x, dim, slice(start, start + third))
    return _picked(trace, x, dim, slice(start, third, call.arg(4, "step", 1)))


@rule("select")
def select(trace: Trace, call: Call) -> Any:
    """Take one index of a dimension, and drop the dimension."""
    x, dim, index = call.args[0], call.arg(1, "dim") % call.args[0].dim(), call.arg(2, "index")
    if not trace.is_meta(x):
        return trace.run(call)
    position = [d - (d > dim) for d in range(x.dim())]
    fields = []
    for field in trace.fields(x):
        if dim in field.dims:
            axis = field.dims.index(dim)
            trace.fix(field, dim, "a single index of this dimension is used")
            dims = tuple(position[d] for d in field.dims if d != dim)
            if dims:
                fields.append(Field(dims, field.atoms.take(index, axis=axis)))
        else:
            fields.append(field.moved(position))
    return trace.new(x.shape[:dim] + x.shape[dim + 1 :], x, tuple(fields))


@rule("unbind")
def unbind(trace: Trace, call: Call) -> Any:
    """Select every index of a dimension."""
    x, dim = call.args[0], call.arg(1, "dim", 0)
    if not trace.is_meta(x):
        return trace.run(call)
    return [trace.apply(torch.ops.aten.select.int, x, dim, i) for i in range(x.shape[dim])]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(trace: Trace, call: Call) -> Any:
    """Cut a dimension into ranges."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    dim = call.arg(2, "dim", 0) % x.dim()
    blank = torch.empty(x.shape, device="meta")
    pieces, start = [], 0
    for part in call.func(blank, *call.args[1:], **call.kwargs):
        pieces.append(_picked(trace, x, dim, slice(start, start + part.shape[dim])))
        start += part.shape[dim]
    return pieces
