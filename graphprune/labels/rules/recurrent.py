"""Recurrent layers: a hidden unit is one channel, with a row in every gate, a column in every consumer.

The operator sums over hidden units inside, where the proof cannot put zeros; it puts them into the columns of the
weights that read them, which is the same. All layers and directions of one operator share their hidden size, so they
keep equal counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from graphprune.labels.atoms import Atoms
from graphprune.labels.field import Field, Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(trace: Trace, call: Call) -> Any:
    """LSTM, GRU or RNN over sequences, steps or batch first: both orders label the last dimension alone."""
    if call.func._overloadname != "input":
        return _packed(trace, call)
    x, state, weights, has_biases = call.args[:4]
    num_layers, bidirectional = call.args[4], call.args[7]
    name = call.name.removeprefix("aten::")
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    directions = 2 if bidirectional else 1
    hidden, outs, width = states[-1].shape[2], states[0].shape[2], 0
    projected = len(states) == 2 and hidden != outs
    per_layer = 2 + 2 * has_biases + projected
    if len(weights) != per_layer * num_layers * directions:
        raise ValueError(f"{call.name} of {num_layers} layers has {len(weights)} weights")
    steps = math.prod(x.shape[:2])
    layer_ins = _features(trace, x)
    layers = iter([weights[i : i + per_layer] for i in range(0, len(weights), per_layer)])
    kept: list[Atoms | None] = []
    cells: list[Atoms | None] = []
    for _ in range(num_layers):
        made = []
        for _ in range(directions):
            unit, out = _layer(trace, call, next(layers), layer_ins, _GATES[name], steps, projected)
            made.append(out)
            kept.append(out)
            cells.append(unit)
        width = outs * directions
        layer_ins = _beside(trace, made, outs)
    places = ((0, kept, outs), (1, cells, hidden)) if len(states) == 2 else ((0, kept, outs),)
    finals = [_state(trace, states[i], atoms, size) for i, atoms, size in places]
    top = () if layer_ins is None else (Field((2,), layer_ins),)
    steps_out = trace.new((*x.shape[:2], width), x, top)
    return (steps_out, *finals)


def _packed(trace: Trace, call: Call) -> Any:
    """Keep everything of a call on packed sequences, whose layout only their lengths say."""
    for tensor in call.tensors():
        trace.freeze(tensor, "a recurrent layer runs over packed sequences")
    return trace.run(call)


def _features(trace: Trace, x: Tensor) -> Atoms | None:
    """Return the atoms of the last dimension; time and batch cannot change."""
    found = None
    for field in trace.fields(x):
        settled = trace.settle(
            field, [d for d in field.dims if d != 2], "a recurrent layer runs over it"
        )
        found = settled.atoms if settled is not None else found
    return found


def _layer(
    trace: Trace,
    call: Call,
    weights: Sequence[Tensor],
    ins: Atoms | None,
    gates: int,
    steps: int,
    projected: bool,
) -> tuple[Atoms | None, Atoms | None]:
    """Meet the weights of one layer and direction; return its hidden units, and what of them others read."""
    given = weights
    ih, hh, *rest = (
        trace.plain(w, range(w.dim()), "the weight of a recurrent layer") for w in weights
    )
    unit = _gated(trace, [ih, hh, *(rest[:-1] if projected else rest)], gates)
    out = unit
    if projected:
        # PyTorch tells a projected layer by its state being wider than its output.
        if unit is not None:
            trace.pin(unit, "the hidden size of a projected LSTM")
        _meet(trace, unit, trace.axis(rest[-1], 1))
        out = trace.axis(rest[-1], 0)
    read = trace.axis(ih, 1)
    _meet(trace, ins, read)
    _meet(trace, out, trace.axis(hh, 1))
    for weight, atoms in ((given[0], read), (given[1], out)):
        if atoms is not None:
            trace.consume(call, weight, Field((1,), atoms))
        own = 1 if unit is not None else len(weight) // gates
        trace.count(
            steps * gates * own * (1 if atoms is not None else weight.shape[1]), unit, atoms
        )
    if projected:
        trace.count(steps * (1 if out is not None else len(rest[-1])), unit, out)
    return unit, out


def _gated(trace: Trace, tensors: Sequence[Tensor], gates: int) -> Atoms | None:
    """Return the hidden units: each has a row in every gate of every weight and bias."""
    rows = [a for a in (trace.axis(t, 0) for t in tensors) if a is not None]
    if not rows or len(rows[0]) == gates:
        for row in rows:
            trace.pin(row, "the only unit of a recurrent layer")
        return None
    parts = np.concatenate([row.reshape(gates, -1) for row in rows])
    return trace.table.unify_along(parts, 0)


def _meet(trace: Trace, a: Atoms | None, b: Atoms | None) -> None:
    if a is not None and b is not None:
        trace.unify(a, b)
    elif a is not None or b is not None:
        trace.pin(a if a is not None else b, FIXED)  # type: ignore[arg-type]


def _beside(trace: Trace, made: Sequence[Atoms | None], size: int) -> Atoms | None:
    """Return the atoms of outputs joined along the last dimension."""
    if all(a is None for a in made) and len(made) == 1:
        return None
    if any(a is None for a in made):
        own = trace.table.fresh(size * len(made))
        trace.pin(own, FIXED)
        return own
    return np.concatenate([a for a in made if a is not None])


def _state(trace: Trace, given: Tensor, units: Sequence[Atoms | None], size: int) -> Tensor:
    """Return the final state of shape (layers, batch, units), and bring those of the first one together with it."""
    shape = tuple(given.shape)
    known = [u for u in units if u is not None]
    fields: Fields = ()
    if len(known) == len(units):
        rows = np.stack(known)
        fields = (Field((2,), rows[0]),) if len(rows) == 1 else (Field((0, 2), rows),)
    source = trace.source(given)
    if source is not None and not source.name and fields:
        # A constant state has no order of its own: only its size follows, which is the same for all layers.
        own = source.axis(2)
        if own is not None:
            trace.unify(own, known[0])
    else:
        extent = frozenset(d for d, n in enumerate(shape) if n > 1)
        operands = [trace.operand(given, 3), (fields, extent)]
        fields = meet(trace.table, operands, FIXED, trace.node)
    return trace.new(shape, given, fields)
