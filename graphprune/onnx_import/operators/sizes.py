"""What sizes are made of, constants, and branches whose condition is known."""

from __future__ import annotations

import operator as python_operator
from typing import Any

import numpy as np
import torch

from graphprune.onnx_import.builder import Builder, Call, constant
from graphprune.onnx_import.file import to_tensor
from graphprune.onnx_import.operators import operator

__all__: list[str] = []


@operator("Constant")
def constant_(b: Builder, call: Call) -> Any:
    """A value of the file."""
    return constant(call.node.attribute[0])


@operator("Shape")
def shape(b: Builder, call: Call) -> Any:
    """Sizes of a tensor, or of a range of its dimensions."""
    sizes = np.empty(call.rank(), dtype=object)
    sizes[:] = call.shape()
    return sizes[call.attr("start", 0) : call.attr("end")]


@operator("Size")
def size(b: Builder, call: Call) -> Any:
    """Number of elements."""
    total: Any = 1
    for one in call.shape():
        total = b.call(python_operator.mul, total, one)
    return np.array(total, dtype=object)


@operator("ConstantOfShape")
def constant_of_shape(b: Builder, call: Call) -> Any:
    """One value everywhere."""
    value = to_tensor(call.attr("value")) if call.attr("value") is not None else torch.zeros(1)
    return b.call(torch.full, call.sizes(0), value.item(), dtype=value.dtype)


@operator("Range")
def range_(b: Builder, call: Call) -> Any:
    """Numbers from a start to a limit."""
    dtype = b.meta(call.value(0))[0].dtype
    if dtype.is_floating_point:
        bounds = [call.const(i) for i in range(3)]
    else:
        bounds = [(call.sizes(i) or [0])[0] for i in range(3)]
    return b.call(torch.arange, *bounds, dtype=dtype)


@operator("If")
def if_(b: Builder, call: Call) -> Any:
    """A branch; which one must be known when the file is read."""
    condition = call.known(0)
    if condition is None:
        raise call.refuse("which branch runs depends on values, which a fixed graph cannot hold")
    branch = call.attr("then_branch" if bool(condition.item()) else "else_branch")
    outer = dict(b.values)
    for weight in branch.initializer:
        b.values[weight.name] = to_tensor(weight)
    b.walk(branch.node)
    results = tuple(b.values[v.name] for v in branch.output)
    b.values = outer
    return results
