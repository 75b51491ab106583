"""Reshapes: dimensions are split and merged in row-major order, and so is the compact label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphprune.labels.field import Field, Fields, crossed, repeated
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []


def _reshaped(trace: Trace, fields: Fields, old: Sequence[int], new: Sequence[int]) -> Fields:
    """Return the fields of a tensor of shape `old` viewed as `new` (row-major)."""
    groups = _aligned_groups(old, new)
    fields = _one_per_group(trace, fields, groups)
    return tuple(
        f for f in (_reshape_field(trace, field, old, new, groups) for field in fields) if f
    )


def _one_per_group(
    trace: Trace, fields: Fields, groups: list[tuple[list[int], list[int]]]
) -> Fields:
    """Put one label in place of all those that a reshape would lay over the same dimension.

    An index of the merged dimension stays where both labels stay: it is a channel of its own, that goes with either.
    Copies that an expansion made are never left, because their number is fixed - but for copies of whole heads, which
    `repeated` tells apart.
    """
    for ins, outs in groups:
        if len(ins) == len(outs) == 1:
            continue
        inside = [f for f in fields if any(d in ins for d in f.dims)]
        if len(outs) == 1 and (heads := _copied_heads(trace, inside, ins)):
            fields = (*(f for f in fields if f not in inside), heads)
            continue
        real = [f for f in inside if not trace.table.are_copies(f.atoms)]
        best = real[0] if real else None
        for other in real[1:]:
            assert best is not None
            # Dimensions of one weight are no labels of their own: they are what is merged and split again.
            is_weight = trace.table.of_one_tensor(best.atoms, other.atoms)
            joint = None if is_weight else crossed(trace.table, best, other)
            if joint and set(joint.dims) <= set(ins):
                fields = (*(f for f in fields if f is not best and f is not other), joint)
                best = joint
            elif other.atoms.size > best.atoms.size:
                best = other
        if any(f is not best for f in fields if any(d in ins for d in f.dims)):
            settled = (
                f
                if f is best
                else trace.settle(f, [d for d in f.dims if d in ins], "merged with another label")
                for f in fields
            )
            fields = tuple(f for f in settled if f is not None)
    return fields


def _copied_heads(trace: Trace, fields: list[Field], dims: list[int]) -> Field | None:
    """Return the label of heads and their copies, where a reshape lays the copies behind each head."""
    heads = next((f for f in fields if f.dims[0] == dims[0] and len(f.dims) > 1), None)
    copies = next((f for f in fields if f.dims == (dims[-1],)), None)
    if heads is None or copies is None or len(fields) != 2 or len(dims) != 2:
        return None
    if dims[1] in heads.dims or not trace.table.are_copies(copies.atoms):
        return None
    atoms = repeated(trace.table, heads.atoms, copies.atoms, trace.node)
    return Field((*dims, *heads.dims[1:]), atoms)


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
    return trace.label(out, _reshaped(trace, trace.fields(x), x.shape, out.shape))


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
