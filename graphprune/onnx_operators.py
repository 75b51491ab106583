"""Operators that torch's ONNX exporter has no translation for, written in ONNX's own.

Each takes what its ATen operator takes, as values of the graph that is being written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18

from graphprune.errors import ExportError

__all__ = ["translations"]

op: Any = opset18  # it takes numbers and lists where its types ask for tensors


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return operator -> translation, for operators that are registered by now."""
    found = {}
    for (space, name, overload), translation in _TABLE.items():
        packet = getattr(getattr(torch.ops, space), name, None)
        if packet is not None:
            found[getattr(packet, overload)] = translation
    return found


def _grouped_mm(x: Any, weights: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows (rows, inner), each times one of the matrices (groups, inner, columns); `offs` says where groups end.

    The operator's other forms are those of its gradients.
    """
    if offs is None or bias is not None or out_dtype is not None or len(x.shape) != 2:
        raise ExportError("aten::_grouped_mm is written for rows of one matrix alone")
    ends = op.Cast(offs, to=7)
    pieces, start = [], op.Constant(value_ints=[0])
    for group in range(weights.shape[0]):
        end = op.Slice(ends, [group], [group + 1], [0])
        matrix = op.Gather(weights, op.Constant(value_int=group), axis=0)
        pieces.append(op.MatMul(op.Slice(x, start, end, [0]), matrix))
        start = end
    behind = op.Slice(x, start, [sys.maxsize], [0])  # rows of no group
    zero = op.CastLike(op.Constant(value_float=0.0), x)
    shape = op.Concat(op.Shape(behind, start=0, end=1), op.Shape(weights, start=2, end=3), axis=0)
    return op.Concat(*pieces, op.Expand(zero, shape), axis=0)


def _histc(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:  # named as in ATen
    """How many of the values lie in each of equal bins; equal bounds stand for the values' own."""
    low, high = (op.CastLike(op.Constant(value_float=float(v)), x) for v in (min, max))
    if min == max:
        low, high = op.ReduceMin(x, keepdims=0), op.ReduceMax(x, keepdims=0)
    width = op.Div(op.Sub(high, low), op.CastLike(op.Constant(value_float=float(bins)), x))
    place = op.Floor(op.Div(op.Sub(x, low), width))
    last = op.CastLike(op.Constant(value_float=float(bins - 1)), x)
    outside = op.Or(op.Less(x, low), op.Greater(x, high))
    none = op.CastLike(op.Constant(value_float=float(bins)), x)
    number = op.Cast(op.Where(outside, none, op.Min(place, last)), to=7)
    values = op.CastLike(op.Constant(value_floats=[0.0, 1.0]), x)
    ones = op.OneHot(op.Reshape(number, [-1]), op.Constant(value_ints=[bins + 1]), values)
    counts = op.ReduceSum(ones, [0], keepdims=0)
    return op.Slice(counts, [0], [bins], [0])


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Values in order, and where they were; of equal ones, TopK takes the first first, so it is stable."""
    axis = dim % len(x.shape)
    size = op.Shape(x, start=axis, end=axis + 1)
    return op.TopK(x, size, axis=axis, largest=int(descending), sorted=1)


_TABLE: Mapping[tuple[str, str, str], Callable[..., Any]] = {
    ("aten", "_grouped_mm", "default"): _grouped_mm,
    ("transformers", "grouped_mm_fallback", "default"): _grouped_mm,
    ("aten", "histc", "default"): _histc,
    ("aten", "sort", "stable"): _sort,
}
