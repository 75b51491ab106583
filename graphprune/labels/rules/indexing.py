"""Indexing: elements picked and written by number.

Where the program holds the numbers in a tensor of its own, they change with the dimension that they count along. Any
other dimension that is indexed cannot change, because the numbers would mean other elements; the rest keep their label.
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
    if (chosen := _chosen(trace, call, x)) is not None:
        return chosen
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


def _chosen(trace: Trace, call: Call, x: Tensor) -> Tensor | None:
    """Return channels chosen or reordered by a vector of numbers that the program holds; None for anything else."""
    if call.name == "aten::index_select":
        dim, numbers = call.arg(1, "dim") % x.dim(), call.arg(2, "index")
    elif call.name in ("aten::index", "aten::_unsafe_index"):
        given = list(call.args[1])
        used = [d for d, i in enumerate(given) if i is not None]
        dim, numbers = used[0], given[used[0]]
        if len(used) > 1:
            return None
    else:
        return None
    source = trace.source(numbers)
    fields = trace.fields(x)
    field = next((f for f in fields if f.dims == (dim,)), None)
    if field is None or source is None or not source.name or trace.is_joint(x):
        return None
    if numbers.dtype not in (torch.int32, torch.int64) or numbers.dim() != 1 or len(numbers) < 2:
        return None
    if not source.count_along(field.atoms):
        return None
    atoms = field.atoms[numbers.cpu().numpy() % x.shape[dim]]
    own = source.axis(0)
    assert own is not None
    trace.unify(own, atoms)
    others = [f for f in fields if f is not field]
    shape = (*x.shape[:dim], len(atoms), *x.shape[dim + 1 :])
    return trace.new(shape, x, (*others, Field((dim,), atoms)))


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


@rule("diagonal", "linalg_diagonal")
def diagonal(trace: Trace, call: Call) -> Any:
    """Take a diagonal: along it both dimensions are the same channels."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    first, second = (0, 1) if call.name == "aten::diagonal" else (-2, -1)
    offset = call.arg(1, "offset", 0)
    a, b = call.arg(2, "dim1", first) % x.dim(), call.arg(3, "dim2", second) % x.dim()
    out = trace.run(call)
    rest = [d for d in range(x.dim()) if d not in (a, b)]
    place = {d: i for i, d in enumerate(rest)}
    fields = trace.fields(x)
    along = [f for f in fields if f.dims in ((a,), (b,))]
    if offset or x.shape[a] != x.shape[b] or len(along) < 2:
        along = []
    left = [
        Field(tuple(place[d] for d in f.dims), f.atoms)
        for one in fields
        if not any(one is f for f in along)
        and (f := trace.settle(one, {a, b} & set(one.dims), "a diagonal is taken of it"))
    ]
    if along:
        trace.unify(along[0].atoms, along[1].atoms)
        left.append(Field((out.dim() - 1,), along[0].atoms))
    return trace.label(out, tuple(left))


@rule("diag_embed")
def diag_embed(trace: Trace, call: Call) -> Any:
    """Lay the last dimension on the diagonal of a matrix of zeros: both dimensions are the same channels."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    out = trace.run(call)
    last = x.dim() - 1
    a, b = (call.arg(i, n, d) % out.dim() for i, n, d in ((2, "dim1", -2), (3, "dim2", -1)))
    rest = [d for d in range(out.dim()) if d not in (a, b)]
    fields: list[Field] = []
    for field in trace.fields(x):
        if field.dims == (last,) and not call.arg(1, "offset", 0):
            fields += [Field((a,), field.atoms), Field((b,), field.atoms)]
        elif left := trace.settle(field, {last} & set(field.dims), "laid on a diagonal"):
            fields.append(left.moved(rest))
    return trace.label(out, tuple(fields))


@rule("tril", "triu")
def triangle(trace: Trace, call: Call) -> Any:
    """Keep one side of a matrix, the last two dimensions, whose indices mean positions."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    fields = _without(trace, x, {x.dim() - 2, x.dim() - 1})
    return trace.new(x.shape, x, fields)
