"""Elementwise operators: labels that meet are the same channel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from graphprune.labels.field import Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__ = ["FIXED", "met", "pointwise"]

FIXED = "meets a dimension whose size cannot change"

_SAME = """
    abs neg sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh cosh
    tanh erf erfc floor ceil round trunc frac relu relu6 sigmoid silu mish gelu elu celu selu softplus
    hardswish hardsigmoid hardtanh hardshrink softshrink leaky_relu log_sigmoid logit threshold
    clamp clamp_min clamp_max clip nan_to_num pow add sub rsub mul div divide multiply subtract true_divide floor_divide
    remainder fmod maximum minimum fmax fmin addcmul addcdiv lerp where masked_fill atan2 hypot logaddexp sinc
    dropout feature_dropout alpha_dropout native_dropout clone contiguous detach alias lift_fresh lift_fresh_copy
    to _to_copy type_as conj resolve_conj resolve_neg positive fake_quantize_per_tensor_affine
    zeros_like ones_like full_like empty_like rand_like randn_like bernoulli xlogy copysign deg2rad
    rrelu rrelu_with_noise
""".split()
_LIKE = ("aten::to", "aten::type_as")
_BOOLEAN = """
    eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not bitwise_xor
""".split()


def met(trace: Trace, tensors: list[Tensor], rank: int) -> Fields:
    """Bring the labels of broadcast tensors together; see `graphprune.labels.field.meet`."""
    if len(tensors) == 1 and tensors[0].dim() == rank:
        return trace.fields(tensors[0])
    return meet(trace.table, [trace.operand(t, rank) for t in tensors], FIXED, trace.node)


def _elementwise(trace: Trace, call: Call, dtype: torch.dtype | None) -> Any:
    tensors = call.tensors()
    if not any(trace.is_meta(t) for t in tensors):
        return trace.run(call)
    if call.name in _LIKE and len(tensors) > 1:  # only the type of the second counts
        dtype, tensors = tensors[1].dtype, tensors[:1]
    shape = (
        torch.broadcast_shapes(*(t.shape for t in tensors))
        if len(tensors) > 1
        else tensors[0].shape
    )
    if dtype is None and any(t.is_complex() for t in tensors):
        dtype = trace.run(call).dtype
    if dtype is None:
        given = (*call.args, *call.kwargs.values())
        dtype = next((a for a in given if isinstance(a, torch.dtype)), None)
    if dtype is None and not any(t.is_floating_point() for t in tensors):
        dtype = trace.run(call).dtype  # a number may make it a floating-point one
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    out = torch.empty(shape, dtype=dtype, device="meta")
    return trace.label(out, met(trace, tensors, len(shape)))


@rule(*_SAME)
def same(trace: Trace, call: Call) -> Any:
    """Give the output the labels of all operands, unified."""
    out = _elementwise(trace, call, None)
    if _is_square(call) or (call.name in _CASTS and id(call.args[0]) in trace.squares):
        trace.squares.add(id(out))
    return out


_CASTS = frozenset({"aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous"})


def _is_square(call: Call) -> bool:
    if call.name in ("aten::mul", "aten::multiply"):
        return call.args[0] is call.args[1]
    exponent = call.arg(1, "exponent") if call.name == "aten::pow" else None
    return call.name == "aten::square" or (not isinstance(exponent, Tensor) and exponent == 2)


@rule(*_BOOLEAN)
def boolean(trace: Trace, call: Call) -> Any:
    """As `same`, for operators that return truth values."""
    return _elementwise(trace, call, torch.bool)


@rule("complex", "polar", "real", "imag")
def pointwise(trace: Trace, call: Call) -> Any:
    """As `same`, for operators whose output is of a type that only they know: whatever PyTorch calls pointwise."""
    tensors = call.tensors()
    out = trace.run(call)
    if not any(trace.is_meta(t) for t in tensors) or not isinstance(out, Tensor):
        return out
    return trace.label(out, met(trace, tensors, out.dim()))


@rule("copy_")
def copy(trace: Trace, call: Call) -> Any:
    """Write one tensor over another: both hold the same channels afterwards."""
    target, source = call.args[0], call.args[1]
    if not trace.is_meta(target) and not trace.is_meta(source):
        return trace.run(call)
    return trace.relabel(target, met(trace, [target, source], target.dim()))


@rule("zero_", "fill_", "normal_", "uniform_", "bernoulli_")
def overwrite(trace: Trace, call: Call) -> Any:
    """Write values that belong to no channel over a tensor, which keeps its labels."""
    return call.args[0] if trace.is_meta(call.args[0]) else trace.run(call)


@rule("prelu", "_prelu_kernel")
def prelu(trace: Trace, call: Call) -> Any:
    """Leaky ReLU whose slope belongs to the channel (dim 1), or to all channels at once."""
    x, weight = call.args
    if weight.numel() > 1 and x.dim() > 1:
        position = (1,)
        own = tuple(f.moved(position) for f in trace.fields(weight))
        rank = x.dim()
        operands = [trace.operand(x, rank), (own, frozenset(position))]
        return trace.new(x.shape, x, meet(trace.table, operands, FIXED, trace.node))
    return trace.new(x.shape, x, trace.fields(x))


@rule("glu")
def glu(trace: Trace, call: Call) -> Any:
    """Gate one half of a dimension with the other: the halves are the same channels."""
    x, dim = call.args[0], call.arg(1, "dim", -1) % call.args[0].dim()
    half = x.shape[dim] // 2
    first = trace.apply(torch.ops.aten.slice.Tensor, x, dim, 0, half)
    second = trace.apply(torch.ops.aten.slice.Tensor, x, dim, half, 2 * half)
    return trace.apply(torch.ops.aten.mul.Tensor, first, second)
