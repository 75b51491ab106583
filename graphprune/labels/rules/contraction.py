"""Contractions: labels meet along what is summed over, and the result carries what is left.

Every contraction is an elementwise product over a shared index space, followed by a sum over one of its dimensions;
convolutions have a fast path because they are most of most networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphprune.labels.atoms import Atoms
from graphprune.labels.field import Field, Fields, coarsen, meet, repeated, tidied
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.trace import Call, Trace

__all__ = ["contracted"]


def contracted(
    trace: Trace,
    call: Call,
    operands: Sequence[tuple[Tensor, Sequence[int]]],
    sizes: Sequence[int],
    reduced: int | Sequence[int],
) -> Fields:
    """Multiply tensors over a shared index space and sum over dimensions of it.

    Args:
        trace: The propagation.
        call: The operator at work.
        operands: Each tensor, with the place of each of its dimensions in the space.
        sizes: Extent of the space.
        reduced: The dimension that is summed over, or several.

    Returns:
        The fields of the result, in the numbering of the space.
    """
    gone = {reduced} if isinstance(reduced, int) else set(reduced)
    moved = []
    for tensor, place in operands:
        wrong = [d for d, p in enumerate(place) if tensor.shape[d] not in (1, sizes[p])]
        if wrong or not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{call.name} does not take {tensor.dtype} of shape {tuple(tensor.shape)} here"
            )
        fields = tuple(f.moved(place) for f in trace.fields(tensor))
        moved.append((fields, frozenset(p for d, p in enumerate(place) if tensor.shape[d] > 1)))
    left = set(gone)
    for (tensor, place), (fields, _) in zip(operands, moved, strict=True):
        for summed in fields:
            if left & set(summed.dims):
                own = [list(place).index(d) for d in summed.dims]
                trace.consume(call, tensor, Field(tuple(own), summed.atoms))
        left -= {d for f in fields for d in f.dims}
    merged = meet(trace.table, moved, FIXED, trace.node)
    _count(trace, merged, sizes)
    result: list[Field] = []
    for field in merged:
        rest = [d for d in field.dims if d not in gone]
        if len(rest) == len(field.dims):
            result.append(field)
        elif rest:
            trace.table.products.append(field.atoms)
            result.append(coarsen(trace.table, field, rest))
    return tidied(trace.table, result)


def _count(trace: Trace, merged: Fields, sizes: Sequence[int]) -> None:
    """Note the multiplications of a product over `sizes`, block by block where labels share their outer dimensions."""
    labelled = {d for f in merged for d in f.dims}
    constant = math.prod(n for d, n in enumerate(sizes) if d not in labelled)
    shared = {d for f in merged for d in f.dims if sum(d in g.dims for g in merged) > 1}
    if not shared:
        trace.count(constant, *(f.atoms for f in merged))
        return
    order = sorted(shared)
    for index in itertools.product(*(range(sizes[d]) for d in order)):
        at = dict(zip(order, index, strict=True))
        trace.count(
            constant,
            *(f.atoms[tuple(at.get(d, slice(None)) for d in f.dims)].ravel() for f in merged),
        )


def _product(trace: Trace, call: Call, a: Tensor, b: Tensor) -> tuple[tuple[int, ...], Fields]:
    """Return shape and fields of a matrix product; the space is (batch..., rows, columns, inner)."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows = (a.shape[-2],) if a.dim() > 1 else ()
    columns = (b.shape[-1],) if b.dim() > 1 else ()
    rank = len(batch) + len(rows) + len(columns)
    row, column = len(batch), len(batch) + len(rows)
    place_a = [*range(len(batch) - max(0, a.dim() - 2), len(batch)), *([row] if rows else []), rank]
    place_b = [
        *range(len(batch) - max(0, b.dim() - 2), len(batch)),
        rank,
        *([column] if columns else []),
    ]
    sizes = (*batch, *rows, *columns)
    fields = contracted(trace, call, [(a, place_a), (b, place_b)], (*sizes, a.shape[-1]), rank)
    return sizes, fields


@rule("matmul", "mm", "bmm", "dot", "vdot", "mv")
def matmul(trace: Trace, call: Call) -> Any:
    """Matrix product, batched or not; vectors count as a single row or column."""
    a, b = call.args
    if not trace.is_meta(a) and not trace.is_meta(b):
        return trace.run(call)
    shape, fields = _product(trace, call, a, b)
    return trace.new(shape, a, fields)


@rule("addmm", "baddbmm", "addmv")
def addmm(trace: Trace, call: Call) -> Any:
    """A matrix product plus a bias."""
    bias, a, b = call.args[:3]
    shape, fields = _product(trace, call, a, b)
    return trace.apply(torch.ops.aten.add.Tensor, trace.new(shape, a, fields), bias)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(trace: Trace, call: Call) -> Any:
    """Rows (rows, inner), each times one of the matrices (experts, inner, columns): a mixture of experts."""
    x, weights = call.args[:2]
    if call.name == "aten::_grouped_mm":
        for tensor in call.tensors():
            trace.freeze(tensor, "its kernel takes multiples of 16 bytes alone")
        return trace.run(call)
    why = "each row takes one of the matrices"
    for field in trace.fields(x):
        if 0 in field.dims:
            trace.fix(field, 0, why)
    weights = trace.plain(weights, (1, 2), why)
    any_one = trace.apply(torch.ops.aten.select.int, weights, 0, 0)
    sizes = (x.shape[0], weights.shape[2])
    fields = contracted(trace, call, [(x, (0, 2)), (any_one, (2, 1))], (*sizes, x.shape[1]), 2)
    return trace.new(sizes, x, fields)


@rule("linear")
def linear(trace: Trace, call: Call) -> Any:
    """A matrix product with a weight of shape (outputs, inputs)."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    rank = x.dim()
    sizes = (*x.shape[:-1], weight.shape[0], x.shape[-1])
    place = [*range(rank - 1), rank]
    fields = contracted(trace, call, [(x, place), (weight, (rank - 1, rank))], sizes, rank)
    if bias is not None:
        operands = [(fields, frozenset(range(rank))), trace.operand(bias, rank)]
        fields = meet(trace.table, [operands[0], operands[1]], FIXED, trace.node)
    return trace.new(sizes[:-1], x, fields)


@rule("inner")
def inner(trace: Trace, call: Call) -> Any:
    """Sums of products along the last dimensions."""
    a, b = call.args
    if (not trace.is_meta(a) and not trace.is_meta(b)) or not a.dim() or not b.dim():
        return trace.apply(torch.ops.aten.mul.Tensor, a, b)
    rank = a.dim() + b.dim() - 2
    place_a = [*range(a.dim() - 1), rank]
    place_b = [*range(a.dim() - 1, rank), rank]
    sizes = (*a.shape[:-1], *b.shape[:-1])
    fields = contracted(trace, call, [(a, place_a), (b, place_b)], (*sizes, a.shape[-1]), rank)
    return trace.new(sizes, a, fields)


@rule("einsum")
def einsum(trace: Trace, call: Call) -> Any:
    """Products and sums over named dimensions."""
    equation, tensors = call.args[0].replace(" ", ""), list(call.args[1])
    ins, _, outs = equation.partition("->")
    terms = ins.split(",")
    ellipsis = max(
        (
            t.dim() - len(term.replace("...", ""))
            for t, term in zip(tensors, terms, strict=True)
            if "..." in term
        ),
        default=0,
    )
    # Dimensions under an ellipsis get names of their own, aligned at the end.
    names = [chr(0x2460 + i) for i in range(ellipsis)]

    def spelled(term: str, rank: int | None) -> list[str]:
        given = list(term.replace("...", "\0"))
        count = ellipsis if rank is None else rank - len(given) + 1
        return [n for c in given for n in (names[ellipsis - count :] if c == "\0" else [c])]

    placed = [spelled(term, t.dim()) for term, t in zip(terms, tensors, strict=True)]
    letters = list(dict.fromkeys(c for one in placed for c in one))
    if "->" in equation:
        kept = spelled(outs, None)
    else:
        once = [c for c in sorted(letters) if sum(one.count(c) for one in placed) == 1]
        kept = names + [c for c in once if c not in names]
    if any(len(set(one)) != len(one) for one in placed):
        return _diagonal(trace, call)
    order = [*kept, *(c for c in letters if c not in kept)]
    sizes = [1] * len(order)
    for tensor, one in zip(tensors, placed, strict=True):
        for dim, c in enumerate(one):
            sizes[order.index(c)] = max(sizes[order.index(c)], tensor.shape[dim])
    operands = [(t, [order.index(c) for c in one]) for t, one in zip(tensors, placed, strict=True)]
    fields = contracted(trace, call, operands, sizes, range(len(kept), len(order)))
    return trace.new(tuple(sizes[: len(kept)]), tensors[0], fields)


def _diagonal(trace: Trace, call: Call) -> Any:
    """Keep everything of an einsum that takes a diagonal."""
    for tensor in call.tensors():
        trace.freeze(tensor, "a diagonal is taken of it")
    return trace.run(call)


@rule("bilinear")
def bilinear(trace: Trace, call: Call) -> Any:
    """Two inputs, contracted with a weight (outputs, first, second)."""
    x, y, weight = call.args[:3]
    bias = call.arg(3, "bias")
    lead = list(range(x.dim() - 1))
    o, i, j = len(lead), len(lead) + 1, len(lead) + 2
    sizes = (*x.shape[:-1], *weight.shape)
    operands = [(x, [*lead, i]), (y, [*lead, j]), (weight, [o, i, j])]
    fields = contracted(trace, call, operands, sizes, (i, j))
    out = trace.new(sizes[: o + 1], x, fields)
    return out if bias is None else trace.apply(torch.ops.aten.add.Tensor, out, bias)


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def cdist(trace: Trace, call: Call) -> Any:
    """Distances between the rows of two matrices: sums over the columns, to which zeros add nothing."""
    a, b = call.args[:2]
    if not trace.is_meta(a) and not trace.is_meta(b):
        return trace.run(call)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rank = len(batch) + 2
    sizes = (*batch, a.shape[-2], b.shape[-2])
    operands = [
        (a, [*range(rank - a.dim(), rank - 2), rank - 2, rank]),
        (b, [*range(rank - b.dim(), rank - 2), rank - 1, rank]),
    ]
    for field in trace.fields(b):  # a difference needs zeros on both sides
        if b.dim() - 1 in field.dims:
            trace.consume(call, b, field)
    fields = contracted(trace, call, operands, (*sizes, a.shape[-1]), rank)
    return trace.new(sizes, a, fields)


# -- attention ----------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(trace: Trace, call: Call) -> Any:
    """Softmax of query times key, times value: two contractions; keys stay where they are."""
    query, key, value = call.args[:3]
    mask = call.arg(3, "attn_mask")
    rank = query.dim()
    if call.arg(7, "enable_gqa", False):
        key, value = (_repeated(trace, t, query.shape[-3]) for t in (key, value))
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    length, steps = query.shape[-2], key.shape[-2]
    lead = list(range(rank - 2))
    operands = [(query, [*lead, rank - 2, rank]), (key, [*lead, rank - 1, rank])]
    sizes = (*batch, length, steps, query.shape[-1])
    weights = contracted(trace, call, operands, sizes, rank)
    scores = trace.new((*batch, length, steps), query, weights)
    if mask is not None:
        scores = trace.apply(torch.ops.aten.add.Tensor, scores, mask)
    for field in trace.fields(scores):
        if rank - 1 in field.dims:
            trace.fix(field, rank - 1, "attention normalises over it")
    fields = contracted(
        trace,
        call,
        [(scores, [*lead, rank - 2, rank]), (value, [*lead, rank, rank - 1])],
        (*batch, length, value.shape[-1], steps),
        rank,
    )
    return trace.new((*batch, length, value.shape[-1]), query, fields)


def _repeated(trace: Trace, x: Tensor, heads: int) -> Tensor:
    """Return `x` with each head as often as there are query heads for it."""
    dim = x.dim() - 3
    times = heads // x.shape[dim]
    if times == 1 or x.shape[dim] == 1:
        return x
    fields = []
    for field in trace.fields(x):
        atoms = field.atoms
        if len(field.dims) > 1 and field.dims[0] == dim:
            copies = repeated(trace.table, atoms, times, trace.node)
            atoms = copies.reshape(heads, *atoms.shape[1:])
        elif dim in field.dims:
            atoms = atoms.repeat(times, axis=field.dims.index(dim))
        fields.append(Field(field.dims, atoms))
    return trace.new((*x.shape[:dim], heads, *x.shape[dim + 1 :]), x, tuple(fields))


# -- convolution --------------------------------------------------------------------------------------------------


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "_convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
def convolution(trace: Trace, call: Call) -> Any:
    """Convolution of any rank, grouped or transposed."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    name = call.func._schema.name.removeprefix("aten::")
    if name in ("convolution", "_convolution"):
        stride, padding, dilation = call.args[3:6]
        transposed, output_padding, groups = call.args[6:9]
    elif name.startswith("conv_transpose"):
        transposed = True
        stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
        output_padding, groups = call.arg(5, "output_padding", 0), call.arg(6, "groups", 1)
        dilation = call.arg(7, "dilation", 1)
    else:
        transposed, output_padding = False, 0
        stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
        dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    kernel = weight.shape[2:]
    channel = x.dim() - len(kernel) - 1
    spatial = _spatial_shape(
        x.shape[channel + 1 :],
        kernel,
        stride,
        padding,
        dilation,
        output_padding if transposed else None,
    )
    wanted = weight.shape[0] if transposed else weight.shape[1] * groups
    if x.shape[channel] != wanted or not x.is_floating_point():
        raise ValueError(
            f"{call.name} takes {wanted} floating channels, found {x.dtype} of shape {tuple(x.shape)}"
        )
    ins = _channel_axis(trace, call, x, channel)
    weight = trace.plain(weight, (0, 1), "the kernel of a convolution")
    outs, counted = (_transposed if transposed else _forward)(trace, weight, ins, groups)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and (own := trace.axis(bias, 0)) is not None:
        if outs is None:
            trace.pin(own, FIXED)
        else:
            trace.unify(outs, own)
    positions = math.prod(x.shape[channel + 1 :] if transposed else spatial)
    constant, factors = counted
    trace.count(math.prod(x.shape[:channel]) * positions * math.prod(kernel) * constant, *factors)
    fields = () if outs is None else (Field((channel,), outs),)
    return trace.new((*x.shape[:channel], channels, *spatial), x, fields)


def _spatial_shape(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
) -> list[int]:
    def spread(value: Any) -> list[int]:
        values: list[int] = [value] if isinstance(value, int) else list(value)
        return values * len(sizes) if len(values) == 1 else values

    stride, dilation = spread(stride), spread(dilation)
    if padding == "same":
        return list(sizes)
    padding = spread(0 if padding == "valid" else padding)
    if output_padding is None:
        return [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
        ]
    extra = spread(output_padding)
    return [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, s, p, d, e in zip(sizes, kernel, stride, padding, dilation, extra, strict=True)
    ]


def _channel_axis(trace: Trace, call: Call, x: Tensor, channel: int) -> Atoms | None:
    """Return the atoms of the input's channels; whatever else is labelled (space, batch) cannot change."""
    result = None
    for field in trace.fields(x):
        others = [d for d in field.dims if d != channel]
        settled = trace.settle(field, others, "a convolution runs over it") if others else field
        if settled is not None:
            if result is not None:
                trace.unify(result, settled.atoms)
            result = settled.atoms
            trace.consume(call, x, settled)
    return result


_Counted = tuple[float, tuple[Atoms | None, ...]]


def _forward(
    trace: Trace, weight: Tensor, ins: Atoms | None, groups: int
) -> tuple[Atoms | None, _Counted]:
    """Meet the weight (outputs, inputs per group, ...); return the output atoms and what to count."""
    per_group = weight.shape[1]
    outs = trace.axis(weight, 0)
    one = 1 if outs is not None else weight.shape[0]
    if groups == 1:
        own = trace.axis(weight, 1)
        _meet_inputs(trace, ins, own)
        return outs, (one * (1 if own is not None else per_group), (outs, own))
    if outs is None:
        return None, (one * per_group, ())
    rows = outs.reshape(groups, -1)
    if per_group == 1:
        _meet_inputs(
            trace, ins, rows[:, 0] if rows.shape[1] == 1 else trace.table.block(rows, is_head=False)
        )
        trace.table.nest(rows, trace.node)
        return outs, (1, (outs,))
    own = trace.axis(
        weight, 1
    )  # none where the graph computes the weight from something without labels
    if ins is None or own is None:
        _meet_inputs(trace, ins, own)
    else:
        trace.unify(ins.reshape(groups, -1), own)
    trace.table.nest(rows, trace.node)
    trace.pin(
        rows if rows.shape[1] == 1 else trace.table.block(rows, is_head=False),
        "a convolution group stays",
    )
    return outs, (1 if own is not None else per_group, (outs, own))


def _transposed(
    trace: Trace, weight: Tensor, ins: Atoms | None, groups: int
) -> tuple[Atoms | None, _Counted]:
    """Meet the weight (inputs, outputs per group, ...) of a transposed convolution."""
    own = trace.axis(weight, 0)
    _meet_inputs(trace, ins, own)
    one = 1 if own is not None else weight.shape[0]
    if groups == 1:
        outs = trace.axis(weight, 1)
        return outs, (one * (1 if outs is not None else weight.shape[1]), (own, outs))
    if own is None:
        return None, (one * weight.shape[1], ())
    rows = own.reshape(groups, -1)
    if rows.shape[1] == 1:
        columns = trace.axis(weight, 1)
        if columns is not None:
            trace.pin(columns, "outputs of a transposed convolution with one input per group")
        return own.repeat(weight.shape[1]), (weight.shape[1], (own,))
    trace.table.nest(rows, trace.node)
    trace.pin(trace.table.block(rows, is_head=False), "a convolution group stays")
    columns = trace.axis(weight, 1)
    if columns is None:
        outs = trace.table.fresh(groups * weight.shape[1])
        trace.pin(outs, "a convolution group stays")
        return outs, (weight.shape[1], (own,))
    outs = columns[None].repeat(groups, axis=0)
    return outs.reshape(-1), (1, (own, columns))


def _meet_inputs(trace: Trace, ins: Atoms | None, own: Atoms | None) -> None:
    if ins is not None and own is not None:
        trace.unify(ins, own)
    elif ins is not None or own is not None:
        trace.pin(ins if ins is not None else own, FIXED)  # type: ignore[arg-type]
