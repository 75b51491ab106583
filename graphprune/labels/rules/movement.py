"""Data movement: the label moves as the data does.

These operators rename, reorder and join dimensions, and do the same to the compact label. What splits and merges
dimensions is in `reshape`, what picks along one in `picking`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.labels.atoms import Atoms
from graphprune.labels.field import Field, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.strides import distance_of, steps_of
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []

# -- renaming dimensions ------------------------------------------------------------------------------------------


def _permuted(trace: Trace, x: Tensor, order: Sequence[int]) -> Tensor:
    position = [0] * len(order)
    for new, old in enumerate(order):
        position[old] = new
    shape = [x.shape[d] for d in order]
    return trace.new(tuple(shape), x, tuple(f.moved(position) for f in trace.fields(x)))


@rule("permute")
def permute(trace: Trace, call: Call) -> Any:
    """Reorder all dimensions."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    return _permuted(trace, x, [d % x.dim() for d in call.arg(1, "dims")])


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT")
def transpose(trace: Trace, call: Call) -> Any:
    """Swap two dimensions."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    order = list(range(x.dim()))
    if call.func._schema.name in ("aten::t", "aten::numpy_T"):
        order.reverse()
    elif call.func._schema.name == "aten::mT":
        order[-2], order[-1] = order[-1], order[-2]
    else:
        a, b = call.arg(1, "dim0") % x.dim(), call.arg(2, "dim1") % x.dim()
        order[a], order[b] = order[b], order[a]
    return _permuted(trace, x, order)


@rule("movedim", "moveaxis")
def movedim(trace: Trace, call: Call) -> Any:
    """Move dimensions to other places."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    # A blank tensor whose strides name its dimensions shows where each of them went.
    blank = torch.empty_strided([2] * x.dim(), list(range(1, x.dim() + 1)), device="meta")
    return _permuted(trace, x, [s - 1 for s in call.func(blank, *call.args[1:]).stride()])


@rule("unsqueeze")
def unsqueeze(trace: Trace, call: Call) -> Any:
    """Add a dimension of size one."""
    x, dim = call.args[0], call.arg(1, "dim") % (call.args[0].dim() + 1)
    if not trace.is_meta(x):
        return trace.run(call)
    position = [d + (d >= dim) for d in range(x.dim())]
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return trace.new(shape, x, tuple(f.moved(position) for f in trace.fields(x)))


@rule("squeeze")
def squeeze(trace: Trace, call: Call) -> Any:
    """Drop dimensions of size one."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    dims = call.arg(1, "dim")
    wanted = range(x.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {d % x.dim() for d in wanted if x.shape[d] == 1}
    position = list(np.cumsum([d not in dropped for d in range(x.dim())]) - 1)
    shape = tuple(n for d, n in enumerate(x.shape) if d not in dropped)
    return trace.new(shape, x, tuple(f.moved([int(p) for p in position]) for f in trace.fields(x)))


@rule("expand", "expand_as", "broadcast_to")
def expand(trace: Trace, call: Call) -> Any:
    """Repeat dimensions of size one: the copies take the label of what they meet, so they get atoms of their own."""
    x = call.args[0]
    size = call.arg(1, "size")
    size = list(size.shape) if isinstance(size, Tensor) else list(size)
    shift = len(size) - x.dim()
    shape = [x.shape[d - shift] if n == -1 else n for d, n in enumerate(size)]
    fields = [f.moved([d + shift for d in range(x.dim())]) for f in trace.fields(x)]
    for dim, n in enumerate(shape):
        if n > 1 and (dim < shift or x.shape[dim - shift] == 1):
            fields.append(Field((dim,), trace.table.copies(n)))
    if not trace.is_meta(x):  # known values, such as row numbers, may yet be spread over channels
        return trace.label(trace.run(call), tuple(fields))
    return trace.new(tuple(shape), x, tuple(fields))


# -- joining ------------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(trace: Trace, call: Call) -> Any:
    """Join tensors along a dimension; along all others they are the same channels."""
    tensors = [t for t in call.args[0] if t.dim() != 1 or t.numel()]
    if not any(trace.is_meta(t) for t in tensors):
        return trace.run(call)
    rank = tensors[0].dim()
    dim = call.arg(1, "dim", 0) % rank
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    joined = [next((f for f in trace.fields(t) if dim in f.dims), None) for t in tensors]
    operands = []
    for tensor, along in zip(tensors, joined, strict=True):
        fields, extent = trace.operand(tensor, rank)
        for field in fields:
            if along is not None and field.dims != along.dims and dim in field.dims:
                trace.settle(field, field.dims, "joined beside another label")
        labelled = set(along.dims) if along else {dim}
        operands.append(
            (tuple(f for f in fields if f is not along and dim not in f.dims), extent - labelled)
        )
    fields = meet(trace.table, operands, FIXED, trace.node)
    if any(joined):
        fields = (*fields, _concatenated(trace, tensors, joined, dim))
    return trace.new(tuple(shape), tensors[0], fields)


def _concatenated(
    trace: Trace, tensors: list[Tensor], joined: list[Field | None], dim: int
) -> Field:
    widest = max((f for f in joined if f), key=lambda f: len(f.dims))
    parts: list[Atoms] = []
    for tensor, along in zip(tensors, joined, strict=True):
        if along is None or not set(along.dims) <= set(widest.dims):
            if along is not None:
                trace.pin(
                    along.atoms, "joined with a tensor that is labelled over other dimensions"
                )
            own = trace.table.fresh(tensor.shape[dim])
            trace.pin(own, "joined from a part whose size cannot change")
            along = Field((dim,), own)
        full = along.over(tensor.dim())
        shape = [tensor.shape[d] for d in sorted(widest.dims)]
        full = full.reshape([full.shape[d] for d in sorted(widest.dims)])
        parts.append(np.broadcast_to(full, shape))
    dims = sorted(widest.dims)
    atoms = np.concatenate(parts, axis=dims.index(dim))
    return Field(widest.dims, atoms.transpose([dims.index(d) for d in widest.dims]))


@rule("stack")
def stack(trace: Trace, call: Call) -> Any:
    """Join tensors along a new dimension."""
    tensors, dim = call.args[0], call.arg(1, "dim", 0)
    dim = dim % (tensors[0].dim() + 1)
    parts = [trace.apply(torch.ops.aten.unsqueeze.default, t, dim) for t in tensors]
    return trace.apply(torch.ops.aten.cat.default, parts, dim)


@rule("pad", "constant_pad_nd")
def pad(trace: Trace, call: Call) -> Any:
    """Add constant borders: along a channel dimension they are channels of their own, and take part in what follows."""
    x, widths = call.args[0], call.arg(1, "pad")
    if not trace.is_meta(x):
        return trace.run(call)
    constant = (
        call.func._schema.name == "aten::constant_pad_nd"
        or call.arg(2, "mode", "constant") == "constant"
    )
    shape, fields = list(x.shape), list(trace.fields(x))
    for pair in range(len(widths) // 2):
        dim = x.dim() - 1 - pair
        before, after = widths[2 * pair], widths[2 * pair + 1]
        if not before and not after:
            continue
        shape[dim] += before + after
        inside = [i for i, f in enumerate(fields) if dim in f.dims]
        if not inside:
            continue
        for extra in reversed(inside[1:]):
            settled = trace.settle(fields[extra], [dim], "padded")
            fields[extra : extra + 1] = [settled] if settled else []
        position = inside[0]
        field = fields[position]
        if not constant or len(field.dims) > 1:
            settled = trace.settle(field, [dim], "padded")
            fields[position : position + 1] = [settled] if settled else []
            continue
        inner = field.atoms[max(0, -before) : len(field.atoms) - max(0, -after)]
        border = [trace.table.fresh(max(0, before)), inner, trace.table.fresh(max(0, after))]
        fields[position] = Field(field.dims, np.concatenate(border))
    return trace.new(tuple(shape), x, tuple(fields))


# -- reordering ---------------------------------------------------------------------------------------------


@rule("flip", "fliplr", "flipud")
def flip(trace: Trace, call: Call) -> Any:
    """Turn dimensions round: what is left is turned round likewise."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    given = {"aten::fliplr": [1], "aten::flipud": [0]}.get(call.name)
    touched = {d % x.dim() for d in (given or call.arg(1, "dims"))}
    fields = []
    for field in trace.fields(x):
        axes = [axis for axis, d in enumerate(field.dims) if d in touched]
        fields.append(Field(field.dims, np.flip(field.atoms, tuple(axes))) if axes else field)
    return trace.new(x.shape, x, tuple(fields))


@rule("roll")
def roll(trace: Trace, call: Call) -> Any:
    """Move indices round within dimensions, by as many as are left of those that come round."""
    x, shifts, dims = call.args[0], call.arg(1, "shifts"), call.arg(2, "dims", [])
    if not trace.is_meta(x):
        return trace.run(call)
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    moved = {d % x.dim(): s for d, s in zip(dims, shifts, strict=True)} if dims else {}
    fields = []
    for field in trace.fields(x):
        touched = {d for d in field.dims if not dims or moved.get(d, 0) % x.shape[d]}
        if touched and (len(field.dims) > 1 or not dims):
            settled = trace.settle(field, touched, "rolled")
            fields += [settled] if settled else []
        elif touched:
            fields.append(Field(field.dims, np.roll(field.atoms, moved[field.dims[0]])))
        else:
            fields.append(field)
    return trace.new(x.shape, x, tuple(fields))


@rule("repeat", "tile")
def repeat(trace: Trace, call: Call) -> Any:
    """Lay copies side by side: every copy is the same channels."""
    x, times = call.args[0], list(call.arg(1, "repeats", call.kwargs.get("dims")))
    if not trace.is_meta(x):
        return trace.run(call)
    rank = max(len(times), x.dim())
    times = [1] * (rank - len(times)) + times
    shift = rank - x.dim()
    sizes = [1] * shift + list(x.shape)
    fields = []
    for field in (f.moved([d + shift for d in range(x.dim())]) for f in trace.fields(x)):
        reps = [times[d] for d in field.dims]
        if len(reps) > 1 and any(r > 1 for r in reps):
            trace.settle(field, field.dims, "repeated")
            continue
        fields.append(Field(field.dims, np.tile(field.atoms, reps)))
    for dim, n in enumerate(times):
        if n > 1 and sizes[dim] == 1:
            fields.append(Field((dim,), trace.table.copies(n)))
    shape = tuple(n * t for n, t in zip(sizes, times, strict=True))
    return trace.new(shape, x, tuple(fields))


# -- windows by strides -------------------------------------------------------------------------------------------


@rule("as_strided")
def as_strided(trace: Trace, call: Call) -> Any:
    """Read a contiguous tensor with other sizes and strides: windows that overlap, steps, diagonals.

    What is no whole contiguous tensor is pinned where it is made (`graphprune.labels.strides`).
    """
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    sizes = [int(n) for n in call.arg(1, "size")]
    strides = [int(n) for n in call.arg(2, "stride")]
    start = steps_of(int(call.arg(3, "storage_offset") or 0), x.shape)
    walks = [
        steps_of(s, x.shape) if n > 1 else (0,) * x.dim()
        for n, s in zip(sizes, strides, strict=True)
    ]
    place = {
        d: k
        for d in range(x.dim())
        if (k := _walked_alone(d, x.shape, sizes, walks, start)) is not None
    }
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d not in place]
        left = trace.settle(field, lost, "read by strides") if lost else field
        if left is not None:
            fields.append(left.moved([place.get(d, -1) for d in range(x.dim())]))
    return trace.new(tuple(sizes), x, tuple(fields))


def _walked_alone(
    dim: int,
    shape: Sequence[int],
    sizes: Sequence[int],
    walks: Sequence[Sequence[int]],
    start: Sequence[int],
) -> int | None:
    """Return the output's dimension that goes through all of `dim` and nothing else, if no other one moves along it."""
    alone = tuple(int(d == dim) for d in range(len(shape)))
    moving = [k for k, walk in enumerate(walks) if walk[dim]]
    if len(moving) != 1 or tuple(walks[moving[0]]) != alone or sizes[moving[0]] != shape[dim]:
        return None
    # What moves along inner dimensions must not run over into this one, nor over its end.
    inner = shape[dim + 1 :]
    reach = distance_of(start[dim + 1 :], inner)
    reach += sum(
        (n - 1) * distance_of(walk[dim + 1 :], inner) for n, walk in zip(sizes, walks, strict=True)
    )
    return moving[0] if not start[dim] and reach < math.prod(inner) else None
