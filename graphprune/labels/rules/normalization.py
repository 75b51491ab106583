"""Normalisations: affine weights and running statistics meet the channel.

Batch and instance norm treat every channel alone. Layer, RMS and group norm take statistics over channels; they are
noted as consumers, because a cut changes their statistics: the proof's reference takes them over the kept channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphprune.labels.field import Field, Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []


def _met_along(trace: Trace, x: Tensor, params: list[Any], dim: int) -> Fields:
    """Bring the labels of 1-D parameters together with those of `x` along `dim`."""
    tensors = [p for p in params if isinstance(p, Tensor)]
    if any(len(t) != x.shape[dim] for t in tensors):
        raise ValueError(f"normalisation of {len(tensors[0])} channels, found {x.shape[dim]}")
    ins = None if trace.is_joint(x) else trace.axis(x, dim)
    if ins is not None:
        for tensor in tensors:
            own = trace.axis(tensor, 0)
            if own is not None:
                trace.unify(ins, own)
        return trace.fields(x)
    operands = [trace.operand(x, x.dim())]
    for tensor in tensors:
        own_fields = tuple(f.moved((dim,)) for f in trace.fields(tensor))
        operands.append((own_fields, frozenset([dim] if tensor.shape[0] > 1 else [])))
    return meet(trace.table, operands, FIXED, trace.node)


@rule(
    "batch_norm",
    "instance_norm",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
)
def batch_norm(trace: Trace, call: Call) -> Any:
    """Every channel (dim 1) has its own scale and shift, and its own statistics over all other dimensions.

    Where those are of this very input, as in weight standardization, they are taken over what is kept.
    """
    x = call.args[0]
    x = _statistics(trace, call, x)
    fields = _met_along(trace, x, list(call.args[1:5]), min(1, x.dim() - 1))
    # Statistics of the batch at hand run over all other dimensions; `_statistics` has noted it of batch_norm itself.
    first = 2 if call.name == "aten::instance_norm" else 0
    is_noted = call.name == "aten::batch_norm" or "no_training" in call.name
    if not is_noted and (call.args[5] or call.args[3] is None):
        settled = (
            trace.settle(f, [d for d in f.dims if d >= first and d != 1], "normalised over it")
            for f in fields
        )
        fields = tuple(f for f in settled if f is not None)
    out = trace.new(x.shape, x, fields)
    if call.func._schema.name in ("aten::batch_norm", "aten::instance_norm"):
        return out
    return (out, trace.new((0,), x), trace.new((0,), x))


def _statistics(trace: Trace, call: Call, x: Tensor) -> Tensor:
    """Note which labels statistics run over; return `x` without those that then cannot go."""
    if call.name == "aten::batch_norm":
        if call.arg(5, "training") or call.arg(3, "running_mean") is None:
            for field in trace.fields(x):
                if set(field.dims) - {1}:
                    trace.consume(call, x, field)
        return x
    if call.name != "aten::instance_norm" or not call.arg(5, "use_input_stats"):
        return x
    why = "instance norm takes statistics over it"
    settled = [trace.settle(f, [d for d in f.dims if d > 1], why) for f in trace.fields(x)]
    return trace.new(x.shape, x, tuple(f for f in settled if f is not None))


@rule("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(trace: Trace, call: Call) -> Any:
    """Statistics over the last dimensions, affine weights aligned with them."""
    x, normalized = call.args[0], call.args[1]
    rank = x.dim()
    if tuple(x.shape[rank - len(normalized) :]) != tuple(normalized):
        raise ValueError(f"normalisation over {tuple(normalized)}, found shape {tuple(x.shape)}")
    affine = [t for t in call.tensors() if t is not x]
    operands = [trace.operand(t, rank) for t in (x, *affine)]
    fields = meet(trace.table, operands, FIXED, trace.node)
    for field in trace.fields(x):
        if any(d >= rank - len(normalized) for d in field.dims):
            trace.consume(call, x, field)
    out = trace.new(x.shape, x, fields)
    if call.func._schema.name != "aten::native_layer_norm":
        return out
    lead = tuple(x.shape[: rank - len(normalized)]) + (1,) * len(normalized)
    return (out, trace.new(lead, x), trace.new(lead, x))


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(trace: Trace, call: Call) -> Any:
    """A direction, divided by its norm over all but one dimension, times a magnitude: the norm is a sum of squares."""
    direction, magnitude, dim = call.args[0], call.args[1], call.arg(2, "dim", 0)
    kept = dim % direction.dim() if dim != -1 else None
    for field in trace.fields(direction):
        if field.dims != (kept,):
            trace.consume(call, direction, field)
    fields = meet(
        trace.table,
        [trace.operand(t, direction.dim()) for t in (direction, magnitude)],
        FIXED,
        trace.node,
    )
    out = trace.new(direction.shape, direction, fields)
    return out if call.name == "aten::_weight_norm" else (out, trace.new(magnitude.shape, out))


@rule("renorm")
def renorm(trace: Trace, call: Call) -> Any:
    """Slices along a dimension, scaled down by their norm over all others."""
    trace.freeze(call.args[0], "renormalised")
    return trace.run(call)


@rule("group_norm", "native_group_norm")
def group_norm(trace: Trace, call: Call) -> Any:
    """Statistics over groups of channels (dim 1): every group keeps equally many, and at least one."""
    x = call.args[0]
    native = call.func._schema.name == "aten::native_group_norm"
    groups = call.args[6] if native else call.args[1]
    params = list(call.args[1:3]) if native else [call.arg(2, "weight"), call.arg(3, "bias")]
    fields = _met_along(trace, x, params, 1)
    joint = next((f for f in fields if 1 in f.dims), None)
    own: tuple[Field, ...] = ()
    for field in fields:
        if field is not joint:
            trace.settle(field, field.dims, "group norm runs over it")
    if joint is None:
        fields = ()
    else:
        settled = trace.settle(joint, [d for d in joint.dims if d != 1], "group norm runs over it")
        assert settled is not None
        rows = settled.atoms.reshape(groups, -1)
        if rows.shape[1] > 1:
            trace.consume(call, x, Field((1,), settled.atoms))
            if groups > 1:
                trace.table.nest(rows, trace.node)
                trace.pin(trace.table.block(rows, is_head=False), "a normalisation group stays")
        else:
            own = (Field((1,), settled.atoms),)
        fields = (settled,)
    out = trace.new(x.shape, x, fields)
    if not native:
        return out
    return (out, *(trace.new((x.shape[0], groups), x, own) for _ in range(2)))
