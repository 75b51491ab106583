"""Indexing: elements picked and written by number.

A dimension that is indexed cannot change, because the numbers would mean other elements; all others keep their label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphprune.labels.field import Field, Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED, met
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []

# -- reading --------------------------------------------------------------------------------------------------------


@rule("index", "_unsafe_index", "index_select", "unfold", "take")
def index(trace: Trace, call: Call) -> Any:
    """Pick elements by number: the picked dimensions cannot change, the others keep their label."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    for tensor in call.tensors()[1:]:
        trace.freeze(tensor, "holds indices")
    out = trace.run(call)
    name = call.func._schema.name
    if name in ("aten::index", "aten::_unsafe_index"):
        return trace.label(out, _indexed(trace, x, list(call.args[1]), out))
    if name == "aten::take":
        kept = {}
    else:
        touched = {call.arg(1, "dim", call.kwargs.get("dimension", 0)) % x.dim()}
        kept = {d: d for d in range(x.dim()) if d not in touched}
    return trace.label(out, _kept_fields(trace, x, kept))


def _indexed(trace: Trace, x: Tensor, indices: list[Any], out: Tensor) -> Fields:
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(i is not None and i.dtype == torch.bool for i in indices):
        return _kept_fields(trace, x, {})
    rank = max(indices[d].dim() for d in used)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    kept, place = {}, 0
    for dim in range(x.dim()):
        if place == first:
            place += rank
        if dim not in used:
            kept[dim] = place
            place += 1
    return _kept_fields(trace, x, kept)


def _kept_fields(trace: Trace, x: Tensor, kept: dict[int, int]) -> Fields:
    """Return the fields over dimensions in `kept` (old -> new); fix all others."""
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d not in kept]
        if settled := trace.settle(field, lost, "indexed by number"):
            fields.append(Field(tuple(kept[d] for d in settled.dims), settled.atoms))
    return tuple(fields)


@rule("gather", "take_along_dim")
def gather(trace: Trace, call: Call) -> Any:
    """Pick along one dimension, by other numbers at every place of the others."""
    x, numbers = (
        call.args[:2] if call.name == "aten::take_along_dim" else (call.args[0], call.args[2])
    )
    dim = call.arg(2, "dim") if call.name == "aten::take_along_dim" else call.args[1]
    if not trace.is_meta(x):
        return trace.run(call)
    out = trace.run(call)
    if dim is None or numbers.dim() != x.dim():
        trace.freeze(x, "indexed by number")
        trace.freeze(numbers, "holds indices")
        return out
    dim %= x.dim()
    sizes = zip(x.shape, numbers.shape, strict=True)
    changing = {d for d, (n, k) in enumerate(sizes) if d == dim or k not in (1, n)}
    if call.name == "aten::gather":  # a size of one is no broadcast here, it takes the first
        changing |= {d for d, n in enumerate(numbers.shape) if n == 1 < x.shape[d]}
    operands = [
        (_without(trace, t, changing), trace.operand(t, x.dim())[1] - changing)
        for t in (x, numbers)
    ]
    return trace.label(out, meet(trace.table, operands, FIXED, trace.node))


def _without(trace: Trace, x: Tensor, dims: set[int]) -> Fields:
    """Return the fields of `x` over all but `dims`, along which nothing may change."""
    fields = (trace.settle(f, dims & set(f.dims), "indexed by number") for f in trace.fields(x))
    return tuple(f for f in fields if f is not None)


# -- writing --------------------------------------------------------------------------------------------------------


@rule("slice_scatter", "select_scatter")
def write_range(trace: Trace, call: Call) -> Any:
    """Write a tensor over a range, or one index, of a dimension."""
    x, source, dim = call.args[0], call.args[1], call.arg(2, "dim", 0) % call.args[0].dim()
    if not trace.is_meta(x) and not trace.is_meta(source):
        return trace.run(call)
    if call.name == "aten::slice_scatter":
        where = [call.arg(i, n) for i, n in ((3, "start"), (4, "end"))]
        part = trace.apply(torch.ops.aten.slice.Tensor, x, dim, *where, call.arg(5, "step", 1))
    else:
        source = trace.apply(torch.ops.aten.unsqueeze.default, source, dim)
        index = call.arg(3, "index") % x.shape[dim]
        part = trace.apply(torch.ops.aten.slice.Tensor, x, dim, index, index + 1)
        _without(trace, x, {dim})
    met(trace, [part, source], x.dim())
    beside = tuple(f for f in trace.fields(source) if dim not in f.dims)
    operands = [trace.operand(x, x.dim()), (beside, trace.operand(source, x.dim())[1] - {dim})]
    return trace.new(x.shape, x, meet(trace.table, operands, FIXED, trace.node))


@rule(
    "index_add",
    "index_copy",
    "index_fill",
    "index_reduce",
    "scatter_add",
    "scatter",
    "scatter_reduce",
)
def write_by_number(trace: Trace, call: Call) -> Any:
    """Write or add along one dimension, at places given by number."""
    x, dim = call.args[0], call.arg(1, "dim") % call.args[0].dim()
    tensors = call.tensors()[1:]
    if not trace.is_meta(x) and not any(trace.is_meta(t) for t in tensors):
        return trace.run(call)
    out = trace.run(call)
    changing = {dim}
    for tensor in tensors:
        if tensor.dim() == x.dim():
            changing |= {d for d in range(x.dim()) if tensor.shape[d] != x.shape[d]}
        elif tensor.dim():
            trace.freeze(tensor, "holds indices")
    operands = [
        (_without(trace, t, changing), trace.operand(t, x.dim())[1] - changing)
        for t in (x, *(t for t in tensors if t.dim() == x.dim()))
    ]
    return trace.label(out, meet(trace.table, operands, FIXED, trace.node))


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(trace: Trace, call: Call) -> Any:
    """Write values at places given by number, along some dimensions."""
    x, indices, values = call.args[0], list(call.args[1]), call.args[2]
    if not trace.is_meta(x) and not trace.is_meta(values):
        return trace.run(call)
    for tensor in indices:
        if tensor is not None:
            trace.freeze(tensor, "holds indices")
    used = {d for d, i in enumerate(indices) if i is not None}
    masked = any(i is not None and i.dtype == torch.bool for i in indices)
    fields = _without(trace, x, set(range(x.dim())) if masked else used)
    if masked:
        trace.freeze(values, "written by number")
        fields = _without(trace, x, set(range(x.dim())))
    elif values.dim():
        blank = torch.empty(x.shape, device="meta")
        places = [None if i is None else trace._to_meta(i) for i in indices]
        picked = torch.ops.aten.index.Tensor(blank, places)
        picked = trace.label(picked, _indexed(trace, x, indices, picked))
        met(trace, [picked, values], picked.dim())
    return trace.new(x.shape, x, fields)


@rule("tril", "triu")
def triangle(trace: Trace, call: Call) -> Any:
    """Keep one side of a matrix, the last two dimensions, whose indices mean positions."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    fields = _without(trace, x, {x.dim() - 2, x.dim() - 1})
    return trace.new(x.shape, x, fields)
