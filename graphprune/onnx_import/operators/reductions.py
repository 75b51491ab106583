"""Operators along dimensions: sums, means, softmax, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphprune.onnx_import.builder import Builder, Call
from graphprune.onnx_import.operators import operator

__all__: list[str] = []


def _prod(b: Builder, x: Any, dims: list[int], keep: bool) -> Any:
    for dim in sorted(dims, reverse=True):
        x = b.call(torch.prod, x, dim, keep)
    return x


def _l1(b: Builder, x: Any, dims: list[int], keep: bool) -> Any:
    return b.call(torch.sum, b.call(torch.abs, x), dims, keep)


def _l2(b: Builder, x: Any, dims: list[int], keep: bool) -> Any:
    return b.call(torch.sqrt, _squares(b, x, dims, keep))


def _squares(b: Builder, x: Any, dims: list[int], keep: bool) -> Any:
    return b.call(torch.sum, b.call(torch.mul, x, x), dims, keep)


def _log_sum(b: Builder, x: Any, dims: list[int], keep: bool) -> Any:
    return b.call(torch.log, b.call(torch.sum, x, dims, keep))


def _simple(function: Any) -> Callable[..., Any]:
    return lambda b, x, dims, keep: b.call(function, x, dims, keep)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": _simple(torch.mean),
    "ReduceSum": _simple(torch.sum),
    "ReduceMax": _simple(torch.amax),
    "ReduceMin": _simple(torch.amin),
    "ReduceLogSumExp": _simple(torch.logsumexp),
    "ReduceProd": _prod,
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceSumSquare": _squares,
    "ReduceLogSum": _log_sum,
}


@operator(*_REDUCTIONS)
def reduce(b: Builder, call: Call) -> Any:
    """Reduce some dimensions, or all of them."""
    axes = call.axes()
    value = call.value(0)
    if isinstance(value, np.ndarray):
        if call.node.op_type == "ReduceProd" and value.ndim == 1:
            total: Any = 1
            for size in value:
                total = b.call(_times, total, size)
            return np.array([total] if call.attr("keepdims", 1) else total, dtype=object)
        raise call.refuse("sizes that follow the batch are reduced")
    if not axes:
        if call.attr("noop_with_empty_axes", 0):
            return value
        axes = list(range(call.rank()))
    dims = [a % call.rank() for a in axes]
    return _REDUCTIONS[call.node.op_type](b, call.tensor(0), dims, bool(call.attr("keepdims", 1)))


def _times(a: Any, b: Any) -> Any:
    return a * b


@operator("ArgMax", "ArgMin")
def arg_extreme(b: Builder, call: Call) -> Any:
    """Position of the largest or smallest element."""
    if call.attr("select_last_index", 0):
        raise call.refuse("the last of several equal elements is asked for; torch gives the first")
    function = torch.argmax if call.node.op_type == "ArgMax" else torch.argmin
    return b.call(function, call.tensor(0), call.attr("axis", 0), bool(call.attr("keepdims", 1)))


@operator("Softmax", "LogSoftmax")
def softmax(b: Builder, call: Call) -> Any:
    """Softmax; before opset 13 over all dimensions from the axis on."""
    function = F.softmax if call.node.op_type == "Softmax" else F.log_softmax
    rank = call.rank()
    x = call.tensor(0)
    if call.opset >= 13:
        return b.call(function, x, call.attr("axis", -1))
    axis = call.attr("axis", 1) % rank
    shape = call.shape()
    if axis == rank - 1 or all(size == 1 for size in shape[axis + 1 :]):
        return b.call(function, x, axis)
    flat = b.call(torch.flatten, x, axis)
    return b.call(torch.reshape, b.call(function, flat, axis), shape)


@operator("CumSum")
def cumsum(b: Builder, call: Call) -> Any:
    """Running sums."""
    if call.attr("exclusive", 0) or call.attr("reverse", 0):
        raise call.refuse("exclusive or reverse running sums")
    return b.call(torch.cumsum, call.tensor(0), int(torch.tensor(call.const(1)).item()))


@operator("TopK")
def topk(b: Builder, call: Call) -> Any:
    """The largest or smallest elements and where they are."""
    sizes = call.sizes(1)
    assert sizes is not None
    axis, largest = call.attr("axis", -1), bool(call.attr("largest", 1))
    found = b.call(
        torch.topk, call.tensor(0), sizes[0], axis, largest, bool(call.attr("sorted", 1))
    )
    return b.items(found, 2)
