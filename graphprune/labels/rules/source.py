"""Tensors that the graph makes: constant fills take the label of what they meet, everything else has a fixed size."""

from __future__ import annotations

from typing import Any

import torch

from graphprune.labels.field import Field
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
)
def fill(trace: Trace, call: Call) -> Any:
    """A constant: every dimension may shrink with what it meets."""
    out = trace.run(call)
    if not out.is_floating_point():
        return out
    blank = torch.empty(out.shape, dtype=out.dtype, device="meta")
    return trace.fill(blank) if out.dim() else blank


@rule("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm")
def enumerate_(trace: Trace, call: Call) -> Any:
    """Values that depend on the position: the size cannot change."""
    return trace.run(call)


@rule("bincount")
def bincount(trace: Trace, call: Call) -> Any:
    """How often each number occurs; ``minlength`` is how many numbers there are."""
    if not any(trace.is_meta(t) for t in call.tensors()):
        return trace.run(call)
    weights, length = call.arg(1, "weights"), call.arg(2, "minlength", 0)
    if not length:
        raise ValueError("bincount expected minlength: without it, its size depends on the data")
    for tensor in call.tensors():
        trace.freeze(tensor, "it is counted")
    dtype = torch.int64 if weights is None else weights.dtype
    return torch.empty(length, dtype=dtype, device="meta")


@rule("embedding")
def embedding(trace: Trace, call: Call) -> Any:
    """Rows of a table: the width is labelled, the row numbers cannot change."""
    weight, index = call.args[:2]
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{call.name} takes row numbers, found {index.dtype}")
    width = trace.axis(trace.plain(weight, [1], "rows of a table"), 1)
    rank = index.dim()
    fields = () if width is None else (Field((rank,), width),)
    return trace.new((*index.shape, weight.shape[1]), weight, fields)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(trace: Trace, call: Call) -> Any:
    """Sums, means or maxima of rows of a table: the width is labelled, the row numbers cannot change."""
    weight = call.args[0]
    width = trace.axis(trace.plain(weight, [1], "rows of a table"), 1)
    for tensor in call.tensors()[1:]:
        trace.freeze(tensor, "holds indices or weights of rows")
    out, *rest = trace.run(call)
    fields = () if width is None else (Field((1,), width),)
    return (trace.label(out, fields), *rest)
