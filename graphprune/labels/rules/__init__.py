"""The rule table: ATen operator -> what it does to labels.

One file per family; each registers its operators by name with `rule`. To teach graphprune an operator, add a line to
the family that it belongs to, or a function under ``@rule("namespace::name")``:

=================  =====================================================================================
contraction.py     convolution, linear, matmul, scaled dot product: labels meet along what is summed over
detection.py       torchvision's regions of a feature map
elementwise.py     labels that meet are the same channel
indexing.py        index, gather, scatter, index_add, ...: read and write by number
movement.py        permute, cat, pad, roll, repeat, ...: the label moves as the data does
normalization.py   batch, layer, group, instance, RMS norm: affine weights meet the channel
picking.py         slice, select, split, ...: the label is sliced as the data is
recurrent.py       LSTM, GRU, RNN: a hidden unit has a row in every gate
reduction.py       sum, mean, softmax, sort, ... along a dimension
reshape.py         view, shuffles of pixels and channels: dimensions are split and merged
spatial.py         pooling, resampling: leading dimensions keep their label
source.py          tensors that the graph makes: zeros, full, arange, embedding tables
=================  =====================================================================================
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from graphprune.labels.trace import Call, Rule, Trace

__all__ = ["find_rule", "known_operators", "rule"]

_RULES: dict[str, Rule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators, given as ``namespace::name`` (``aten`` where left out).

    The function takes the `Trace` and the `Call`, notes its facts, and returns the operator's output.

    Raises:
        ValueError: An operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            key = name if "::" in name else f"aten::{name}"
            if key in _RULES:
                raise ValueError(f"operator {key} already has the rule {_RULES[key].__qualname__}")
            _RULES[key] = function
        _FOUND.clear()
        return function

    return register


def find_rule(func: Any) -> Rule | None:
    """Return the rule of an operator overload; in-place forms share the rule of the functional one."""
    if func in _FOUND:
        return _FOUND[func]
    name = func._schema.name
    found = _RULES.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        functional = _RULES.get(name.removesuffix("_"))
        found = None if functional is None else _in_place(functional)
    if found is None and torch.Tag.pointwise in func.tags and len(func._schema.returns) == 1:
        from graphprune.labels.rules.elementwise import pointwise  # it registers itself here

        found = pointwise
        found = _in_place(found) if name.endswith("_") else found
    _FOUND[func] = found
    return found


def known_operators() -> tuple[str, ...]:
    """Return the names of all operators with a rule."""
    return tuple(sorted(_RULES))


def _in_place(functional: Rule) -> Rule:
    def run(trace: Trace, call: Call) -> Any:
        result = functional(trace, call)
        target = call.args[0]
        if trace.is_meta(target) and tuple(result.shape) == tuple(target.shape):
            return trace.relabel(target, trace.fields(result))
        return result

    return run


for _family in (
    "contraction",
    "detection",
    "elementwise",
    "indexing",
    "movement",
    "normalization",
    "picking",
    "recurrent",
    "reduction",
    "reshape",
    "source",
    "spatial",
):
    importlib.import_module(f"{__name__}.{_family}")  # each registers itself
