"""Reductions: what is left after a dimension is summed, averaged, compared or normalised over.

A sum over channels is a contraction with ones, and so is a mean: its divisor is a scale, which keeps its old value. The
mean of their squares is what an RMS norm divides by: as in `normalization`, the proof takes it over the kept channels.
Any other statistic over channels would change with their number, so the channels are pinned; over space or time nothing
happens to the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from graphprune.labels.field import Field, Fields, coarsen, tidied
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []

STATISTIC = "a statistic is taken over it"


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [d % rank for d in ([value] if isinstance(value, int) else value)]


def _left(
    trace: Trace, call: Call, x: Tensor, dims: Sequence[int], *, keepdim: bool, is_sum: bool
) -> Fields:
    """Return the fields of `x` after a reduction over `dims`."""
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d in dims]
        rest = [d for d in field.dims if d not in dims]
        left: Field | None = field
        if lost and is_sum:
            trace.consume(call, x, field)
            left = coarsen(trace.table, field, rest) if rest else None
        elif lost:
            left = trace.settle(field, lost, STATISTIC)
        if left is not None:
            fields.append(left)
    fields = list(tidied(trace.table, fields))
    if keepdim:
        return tuple(fields)
    position = [d - sum(r < d for r in dims) for d in range(x.dim())]
    return tuple(f.moved(position) for f in fields)


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "linalg_vector_norm",
"logsumexp", "all",
      "any", "argmax", "argmin", "median", "nansum", "var_mean", "std_mean", "count_nonzero", "mode", "kthvalue",
      "aminmax", "nanmean", "nanmedian")  # fmt: skip
def reduce(trace: Trace, call: Call) -> Any:
    """Reduce some or all dimensions."""
    x = call.args[0]
    if len(call.tensors()) > 1:  # max(a, b) and min(a, b) compare elementwise
        from graphprune.labels.rules.elementwise import same

        return same(trace, call)
    if not any(trace.is_meta(t) for t in call.tensors()):
        return trace.run(call)
    overload = {a.name: i for i, a in enumerate(call.func._schema.arguments)}
    given = None
    if "dim" in overload:
        default = call.func._schema.arguments[overload["dim"]].default_value
        given = call.arg(overload["dim"], "dim", default)
    keepdim = (
        bool(call.arg(overload["keepdim"], "keepdim", False)) if "keepdim" in overload else False
    )
    out = trace.run(call)
    name = call.func._schema.name
    dims = _dims(given, x.dim())
    # A norm sums powers, to which a removed channel adds nothing.
    is_sum = name in ("aten::sum", "aten::nansum") or ("norm" in name and _order(call) > 0)
    is_sum |= name == "aten::mean" and id(x) in trace.squares
    if name == "aten::mean" and not is_sum and _is_scale(trace, x, dims):
        is_sum = True
        trace.means.add(trace.node)
    fields = _left(trace, call, x, dims, keepdim=keepdim, is_sum=is_sum)
    return _labelled(trace, out, fields)


def _is_scale(trace: Trace, x: Tensor, dims: Sequence[int]) -> bool:
    """Whether the divisor of a mean is a number of the graph that the cut can keep, and must.

    One over samples too would follow the batch; one inside a module or a composite function cannot be written.
    """
    name = str(getattr(trace.target, "__name__", trace.target)).partition(".")[0]
    labelled = {d for f in trace.fields(x) for d in f.dims}
    return name == "mean" and 0 not in dims and not labelled.isdisjoint(dims)


def _order(call: Call) -> float:
    """Return which norm is taken."""
    order = call.arg(1, "p" if call.name == "aten::norm" else "ord", 2)
    return 2.0 if order is None else float(order)


def _labelled(trace: Trace, out: Any, fields: Fields) -> Any:
    if isinstance(out, Tensor):
        return trace.label(out, fields)
    return tuple(trace.label(o, fields) for o in out)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "argsort", "topk",
      "logcumsumexp", "cummax", "cummin", "_safe_softmax")  # fmt: skip
def normalise(trace: Trace, call: Call) -> Any:
    """Combine along one dimension and keep it: that dimension cannot change, the others keep their label."""
    x = call.args[0]
    if not any(trace.is_meta(t) for t in call.tensors()):
        return trace.run(call)
    places = {a.name: i for i, a in enumerate(call.func._schema.arguments)}
    dim = call.arg(places["dim"], "dim", -1) if "dim" in places else -1
    dim %= max(1, x.dim())
    fields = []
    for field in trace.fields(x):
        left = trace.settle(field, [dim], STATISTIC) if dim in field.dims else field
        if left is not None:
            fields.append(left)
    name = call.func._schema.name
    if "softmax" in name:
        return trace.new(x.shape, x, tuple(fields))
    return _labelled(trace, trace.run(call), tuple(fields))
