"""Elementwise operators; on vectors of sizes they are integer arithmetic."""

from __future__ import annotations

import functools
import operator as python_operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphprune.onnx_import.builder import Builder, Call
from graphprune.onnx_import.operators import operator

__all__ = ["to_dtype"]

_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}


def _truncated(a: int, b: int) -> int:
    return -(-a // b) if (a < 0) != (b < 0) else a // b


_ON_SIZES: dict[str, Callable[..., Any]] = {
    "Add": python_operator.add,
    "Sub": python_operator.sub,
    "Mul": python_operator.mul,
    "Div": python_operator.floordiv,
    "Mod": python_operator.mod,
    "Max": max,
    "Min": min,
    "Equal": python_operator.eq,
    "Greater": python_operator.gt,
    "GreaterOrEqual": python_operator.ge,
    "Less": python_operator.lt,
    "LessOrEqual": python_operator.le,
}


def _on_sizes(b: Builder, call: Call) -> Any:
    """Compute with integers, element by element; a size may be a node."""
    if call.node.op_type not in _ON_SIZES:
        return None
    function = _ON_SIZES[call.node.op_type]
    values = [call.value(i) for i in range(len(call))]
    arrays = []
    for value in values:
        known = b.weight_of(value) if isinstance(value, fx.Node) else value
        if known is None:
            return None
        arrays.append(known if isinstance(known, np.ndarray) else _objects(known))
    if not any(isinstance(v, np.ndarray) for v in values):
        return None

    def apply(x: Any, y: Any) -> Any:
        if isinstance(x, fx.Node) or isinstance(y, fx.Node):
            return b.call(function, x, y)
        return _truncated(x, y) if function is python_operator.floordiv else function(x, y)

    result = functools.reduce(lambda x, y: np.frompyfunc(apply, 2, 1)(x, y), arrays)
    return result if isinstance(result, np.ndarray) else np.array(result, dtype=object)


def _objects(tensor: Tensor) -> np.ndarray[Any, Any]:
    array = np.empty(tuple(tensor.shape), dtype=object)
    array[...] = np.array(tensor.tolist(), dtype=object).reshape(array.shape)
    return array


def _scalar(value: Any, other: Any) -> Any:
    """Return a known tensor of one element as a number, where that broadcasts as the tensor does."""
    is_number = isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool
    return value.item() if is_number and isinstance(other, fx.Node) else value


def _operands(b: Builder, call: Call) -> tuple[Any, Any]:
    x, y = call.tensor(0), call.tensor(1)
    ranks = [len(b.meta(v)[0].shape) for v in (x, y)]
    if ranks[0] <= ranks[1]:
        x = _scalar(x, y)
    if ranks[1] <= ranks[0]:
        y = _scalar(y, x)
    return x, y


@operator(*_UNARY)
def unary(b: Builder, call: Call) -> Any:
    """One operand, no attributes."""
    value = call.value(0)
    if isinstance(value, np.ndarray) and call.node.op_type in ("Floor", "Ceil", "Round"):
        return value
    return b.call(_UNARY[call.node.op_type], call.tensor(0))


@operator(*_BINARY)
def binary(b: Builder, call: Call) -> Any:
    """Two operands that broadcast."""
    sizes = _on_sizes(b, call)
    if sizes is not None:
        return sizes
    x, y = _operands(b, call)
    if call.node.op_type in ("Add", "Mul") and not isinstance(x, fx.Node):
        x, y = y, x  # a number comes second, as people write it
    return b.call(_BINARY[call.node.op_type], x, y)


@operator("Div")
def div(b: Builder, call: Call) -> Any:
    """Division; of integers, towards zero."""
    sizes = _on_sizes(b, call)
    if sizes is not None:
        return sizes
    x, y = _operands(b, call)
    if all(not b.meta(call.value(i))[0].dtype.is_floating_point for i in (0, 1)):
        return b.call(torch.div, x, y, rounding_mode="trunc")
    return b.call(torch.div, x, y)


@operator("Mod")
def mod(b: Builder, call: Call) -> Any:
    """Remainder; with ``fmod`` its sign is the dividend's."""
    sizes = _on_sizes(b, call)
    if sizes is not None:
        return sizes
    x, y = _operands(b, call)
    return b.call(torch.fmod if call.attr("fmod", 0) else torch.remainder, x, y)


@operator("Max", "Min", "Sum", "Mean")
def variadic(b: Builder, call: Call) -> Any:
    """Any number of operands."""
    sizes = _on_sizes(b, call)
    if sizes is not None:
        return sizes
    kind = call.node.op_type
    function: Any = {"Max": torch.maximum, "Min": torch.minimum}.get(kind, torch.add)
    operands = [call.tensor(i) for i in range(len(call))]
    result = functools.reduce(lambda x, y: b.call(function, x, y), operands)
    return b.call(torch.div, result, len(operands)) if kind == "Mean" else result


@operator("Clip")
def clip(b: Builder, call: Call) -> Any:
    """Limits that are attributes in old files and inputs in new ones."""
    low = call.attr("min") if call.opset < 11 else call.const(1)
    high = call.attr("max") if call.opset < 11 else call.const(2)
    return b.call(torch.clamp, call.tensor(0), low, high)


@operator("Where")
def where(b: Builder, call: Call) -> Any:
    """Choose by a condition; on sizes the condition must be known."""
    condition = call.known(0)
    values = [call.value(1), call.value(2)]
    if condition is not None and any(isinstance(v, np.ndarray) for v in values):
        first, second = (v if isinstance(v, np.ndarray) else _objects(v) for v in values)
        return np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)(
            _objects(condition), first, second
        )
    return b.call(torch.where, call.tensor(0), call.tensor(1), call.tensor(2))


def to_dtype(code: int, call: Call) -> torch.dtype:
    """Return the torch type of an ONNX type code."""
    if code == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(code))).dtype
    except TypeError as error:
        raise call.refuse(f"there is no type {onnx.TensorProto.DataType.Name(code)}") from error


@operator("Cast", "CastLike")
def cast(b: Builder, call: Call) -> Any:
    """Another type; sizes stay what they are."""
    if call.node.op_type == "CastLike":
        dtype = b.meta(call.value(1))[0].dtype
    else:
        dtype = to_dtype(call.attr("to"), call)
    value = call.value(0)
    if isinstance(value, np.ndarray) and not dtype.is_floating_point:
        return value
    x = call.tensor(0)
    return x if b.meta(x)[0].dtype == dtype else b.call("to", x, dtype)


@operator("LeakyRelu")
def leaky_relu(b: Builder, call: Call) -> Any:
    """A small slope below zero."""
    return b.call(F.leaky_relu, call.tensor(0), call.attr("alpha", 0.01))


@operator("Elu")
def elu(b: Builder, call: Call) -> Any:
    """Exponential below zero."""
    return b.call(F.elu, call.tensor(0), call.attr("alpha", 1.0))


@operator("Celu")
def celu(b: Builder, call: Call) -> Any:
    """Exponential below zero, continuously differentiable."""
    return b.call(F.celu, call.tensor(0), call.attr("alpha", 1.0))


@operator("Selu")
def selu(b: Builder, call: Call) -> Any:
    """Scaled exponential; with other constants than torch's it is written out."""
    alpha, gamma = call.attr("alpha", 1.6732632), call.attr("gamma", 1.0507010)
    return b.call(torch.mul, b.call(F.elu, call.tensor(0), alpha), gamma)


@operator("HardSigmoid")
def hard_sigmoid(b: Builder, call: Call) -> Any:
    """``clip(alpha x + beta, 0, 1)``."""
    scaled = b.call(torch.mul, call.tensor(0), call.attr("alpha", 0.2))
    return b.call(torch.clamp, b.call(torch.add, scaled, call.attr("beta", 0.5)), 0.0, 1.0)


@operator("Gelu")
def gelu(b: Builder, call: Call) -> Any:
    """Gaussian error linear unit."""
    return b.call(F.gelu, call.tensor(0), approximate=call.attr("approximate", "none"))


@operator("ThresholdedRelu")
def thresholded_relu(b: Builder, call: Call) -> Any:
    """Zero up to a threshold."""
    return b.call(F.threshold, call.tensor(0), call.attr("alpha", 1.0), 0.0)


@operator("PRelu")
def prelu(b: Builder, call: Call) -> Any:
    """Slopes that broadcast: ``max(x, 0) + slope * min(x, 0)``."""
    x, slope = call.tensor(0), call.tensor(1)
    low = b.call(torch.mul, b.call(torch.clamp, x, max=0.0), _scalar(slope, x))
    return b.call(torch.add, b.call(F.relu, x), low)


@operator("Identity", "Dropout")
def identity(b: Builder, call: Call) -> Any:
    """What goes in; dropout does nothing in a file that is not for training."""
    if len(call.node.output) > 1 and call.node.output[1]:
        raise call.refuse("its mask is used, as in training; export the model for inference")
    return call.value(0)
