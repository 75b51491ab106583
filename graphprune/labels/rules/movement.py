"""Data movement: the label moves as the data does.

These operators rename, split, merge, pick and join dimensions, and do the same to the compact label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.labels.atoms import Atoms
from graphprune.labels.field import Field, Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.trace import Call, Trace

__all__ = ["reshaped"]


# -- reshape ------------------------------------------------------------------------------------------------------


def reshaped(trace: Trace, fields: Fields, old: Sequence[int], new: Sequence[int]) -> Fields:
    """Return the fields of a tensor of shape `old` viewed as `new` (row-major)."""
    groups = _aligned_groups(old, new)
    fields = _one_per_group(trace, fields, groups)
    return tuple(
        f for f in (_reshape_field(trace, field, old, new, groups) for field in fields) if f
    )


def _one_per_group(
    trace: Trace, fields: Fields, groups: list[tuple[list[int], list[int]]]
) -> Fields:
    """Settle all but one of the labels that a reshape would lay over the same dimension.

    An index of the merged dimension stays where both labels stay, which is no channel of either: one of them must be
    whole. The widest is left; copies that an expansion made never are, because the number of copies is fixed.
    """
    for ins, outs in groups:
        if len(ins) == len(outs) == 1:
            continue
        inside = [f for f in fields if any(d in ins for d in f.dims)]
        real = [f for f in inside if not trace.table.are_copies(f.atoms)]
        best = max(real, key=lambda f: f.atoms.size, default=None)
        if any(f is not best for f in inside):
            settled = (
                f
                if f is best
                else trace.settle(f, [d for d in f.dims if d in ins], "merged with another label")
                for f in fields
            )
            fields = tuple(f for f in settled if f is not None)
    return fields


def _aligned_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into the shortest runs of dimensions with equal products; sizes of one are left out."""
    i = [d for d, n in enumerate(old) if n != 1]
    j = [d for d, n in enumerate(new) if n != 1]
    groups = []
    a = b = 0
    while a < len(i) and b < len(j):
        ins, outs = [i[a]], [j[b]]
        left, right = old[i[a]], new[j[b]]
        a, b = a + 1, b + 1
        while left != right:
            if left < right:
                left *= old[i[a]]
                ins.append(i[a])
                a += 1
            else:
                right *= new[j[b]]
                outs.append(j[b])
                b += 1
        groups.append((ins, outs))
    return groups


def _reshape_field(
    trace: Trace,
    field: Field,
    old: Sequence[int],
    new: Sequence[int],
    groups: list[tuple[list[int], list[int]]],
) -> Field | None:
    for ins, outs in groups:
        inside = [d for d in field.dims if d in ins]
        if not inside:
            continue
        if len(ins) == len(outs) == 1:
            field = Field(
                tuple(-1 - outs[0] if d == ins[0] else d for d in field.dims), field.atoms
            )
            continue
        field = _regroup(trace, field, inside, ins, outs, old, new)
    field = Field(tuple(-1 - d for d in field.dims), field.atoms)  # new dims were written as -1 - d
    return field if field.dims else None


def _regroup(
    trace: Trace,
    field: Field,
    inside: list[int],
    ins: list[int],
    outs: list[int],
    old: Sequence[int],
    new: Sequence[int],
) -> Field:
    """Replace the dimensions `inside` of `field` by those of the group's new shape along which the label varies."""
    start = field.dims.index(inside[0])
    contiguous = field.dims[start : start + len(inside)] == tuple(inside)
    if len(inside) > 1 and not (contiguous and inside == sorted(inside)):
        # Blocks interleave when they are merged in this order: every block keeps the same indices.
        for axis in range(len(field.dims) - 1):
            trace.table.unify_along(field.atoms, axis)
    axes = [field.dims.index(d) for d in inside]
    rest = [axis for axis in range(len(field.dims)) if axis not in axes]
    order = sorted(range(len(inside)), key=inside.__getitem__)
    atoms = field.atoms.transpose([*rest, *(axes[k] for k in order)])
    head = atoms.shape[: len(rest)]
    full = atoms.reshape(*head, *(old[d] if d in inside else 1 for d in ins))
    full = np.broadcast_to(full, (*head, *(old[d] for d in ins))).reshape(
        *head, *(new[d] for d in outs)
    )
    dims: list[int] = []
    for position in reversed(range(len(outs))):
        axis = len(head) + position
        first = full.take([0], axis=axis)
        if (full == first).all():
            full = first.squeeze(axis)
        else:
            dims.insert(0, -1 - outs[position])
    if not dims:
        trace.pin(full, "all of a dimension is one channel")
    before = [axis for axis in rest if axis < start]
    back = [
        *range(len(before)),
        *range(len(head), len(head) + len(dims)),
        *range(len(before), len(head)),
    ]
    names = [*(field.dims[a] for a in before), *dims, *(field.dims[a] for a in rest if a > start)]
    return Field(tuple(names), full.transpose(back))


def _view(trace: Trace, x: Tensor, shape: Sequence[int]) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device="meta").view(tuple(shape))
    return trace.label(out, reshaped(trace, trace.fields(x), x.shape, out.shape))


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
)
def view(trace: Trace, call: Call) -> Any:
    """Split and merge dimensions; a label over several new dimensions is a nest."""
    x = call.args[0]
    if not trace.is_meta(x):
        return trace.run(call)
    if call.func._schema.name in ("aten::flatten", "aten::unflatten"):
        blank = torch.empty(x.shape, device="meta")
        shape = call.func(blank, *call.args[1:], **call.kwargs).shape
    else:
        shape = call.arg(1, "size", call.kwargs.get("shape"))
        shape = shape.shape if isinstance(shape, Tensor) else shape
    if isinstance(shape, torch.dtype):
        trace.freeze(x, "viewed as another type")
        return trace.run(call)
    return _view(trace, x, shape)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(trace: Trace, call: Call) -> Any:
    """Shuffles are a view, a permutation and a view."""
    x, factor = call.args[0], int(call.args[1])
    *batch, channels, height, width = x.shape
    lead = len(batch)
    name = call.func._schema.name
    inner: tuple[int, ...]
    order: tuple[int, ...]
    if name == "aten::pixel_shuffle":
        inner = (channels // factor**2, factor, factor, height, width)
        order, last = (0, 3, 1, 4, 2), (channels // factor**2, height * factor, width * factor)
    elif name == "aten::pixel_unshuffle":
        inner = (channels, height // factor, factor, width // factor, factor)
        order, last = (0, 2, 4, 1, 3), (channels * factor**2, height // factor, width // factor)
    else:
        inner = (factor, channels // factor, height, width)
        order, last = (1, 0, 2, 3), (channels, height, width)
    if name == "aten::pixel_unshuffle":  # space is split by a factor that no cut changes
        x = _settled(trace, x, {lead + 1, lead + 2})
    out = trace.apply(torch.ops.aten.view.default, x, [*batch, *inner])
    if name == "aten::pixel_shuffle":
        out = _settled(trace, out, {lead + 1, lead + 2})
    for field in trace.fields(out):
        if "channel_shuffle" in name and lead in field.dims:
            trace.fix(field, lead, "the number of groups of a shuffle")
    out = trace.apply(
        torch.ops.aten.permute.default, out, [*range(lead), *(lead + d for d in order)]
    )
    return trace.apply(torch.ops.aten.view.default, out, [*batch, *last])


def _settled(trace: Trace, x: Tensor, dims: set[int]) -> Tensor:
    """Return `x` with every label settled along `dims`, whose sizes the operator holds."""
    fields = (
        trace.settle(f, dims & set(f.dims), "shuffled by a fixed factor") for f in trace.fields(x)
    )
    return trace.new(tuple(x.shape), x, tuple(f for f in fields if f is not None))


@rule("view_as_complex")
def view_as_complex(trace: Trace, call: Call) -> Any:
    """Pairs along the last dimension become complex numbers: a pair goes as a whole."""
    x = call.args[0]
    last = x.dim() - 1
    fields = (trace.settle(f, {last} & set(f.dims), "a complex number") for f in trace.fields(x))
    return trace.label(trace.run(call), tuple(f for f in fields if f is not None))


@rule("view_as_real")
def view_as_real(trace: Trace, call: Call) -> Any:
    """Complex numbers become pairs along a new last dimension."""
    return trace.label(trace.run(call), trace.fields(call.args[0]))


@rule("rot90")
def rot90(trace: Trace, call: Call) -> Any:
    """Turn a plane; what is labelled within it stays."""
    x, plane = call.args[0], {d % call.args[0].dim() for d in call.arg(2, "dims", [0, 1])}
    if not trace.is_meta(x):
        return trace.run(call)
    fields = (trace.settle(f, plane & set(f.dims), "turned") for f in trace.fields(x))
    return trace.label(trace.run(call), tuple(f for f in fields if f is not None))


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


# -- picking ------------------------------------------------------------------------------------------------------


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
