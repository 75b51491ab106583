"""Pooling and resampling: they move along trailing dimensions, so only the leading ones keep their label."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from graphprune.labels.field import Field, Fields, meet
from graphprune.labels.rules import rule
from graphprune.labels.rules.elementwise import FIXED
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []

_POOLS = [
    f"{kind}{n}d{suffix}"
    for kind, suffixes in {
        "max_pool": ("", "_with_indices"),
        "avg_pool": ("",),
        "adaptive_avg_pool": ("",),
        "_adaptive_avg_pool": ("",),
        "adaptive_max_pool": ("",),
        "fractional_max_pool": ("",),
        "reflection_pad": ("",),
        "replication_pad": ("",),
    }.items()
    for n in (1, 2, 3)
    for suffix in suffixes
    if (kind, n) not in (("_adaptive_avg_pool", 1), ("fractional_max_pool", 1))  # no such operators
]
_RESAMPLERS = [
    f"upsample_{kind}{n}d" for kind, n in (("nearest", 1), ("nearest", 2), ("nearest", 3))
]
_RESAMPLERS += [
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
]
_RESAMPLERS += [f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)]
_RESAMPLERS += ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]


def _leading(trace: Trace, x: Tensor, spatial: int, why: str) -> Fields:
    """Return the fields of `x` over all but its last `spatial` dimensions, whose sizes are fixed."""
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d >= x.dim() - spatial]
        left = trace.settle(field, lost, why) if lost else field
        if left is not None:
            fields.append(left)
    return tuple(fields)


@rule(*_POOLS, *_RESAMPLERS)
def pool(trace: Trace, call: Call) -> Any:
    """Combine or repeat positions of every channel alone."""
    x = call.args[0]
    found = re.search(r"(\d)d", call.func._schema.name)
    assert found
    out = trace.run(call)
    fields = _leading(trace, x, int(found.group(1)), "pooled or resampled")
    if isinstance(out, Tensor):
        return trace.label(out, fields)
    return tuple(trace.label(o, fields) for o in out)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(trace: Trace, call: Call) -> Any:
    """Resample space; the grid's coordinates (last dimension) cannot change."""
    x, grid = call.args[:2]
    spatial = x.dim() - 2
    trace.freeze(grid, "coordinates of a resampling")
    out = trace.run(call)
    return trace.label(out, _leading(trace, x, spatial, "resampled"))


@rule("im2col", "col2im")
def unfold(trace: Trace, call: Call) -> Any:
    """Patches to columns and back: all of a channel's patch positions are that channel."""
    x = call.args[0]
    out = trace.run(call)
    lead = x.dim() - (3 if call.func._schema.name == "aten::im2col" else 2)
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d != lead]
        left = trace.settle(field, lost, "unfolded") if lost else field
        if left is None:
            continue
        ratio = out.shape[lead] / x.shape[lead]
        if ratio >= 1:
            fields.append(Field((lead,), left.atoms.repeat(int(ratio))))
        else:
            rows = left.atoms.reshape(out.shape[lead], -1)
            fields.append(Field((lead,), trace.table.unify_along(rows, 1)))
    return trace.label(out, tuple(fields))


@rule("max_unpool2d", "max_unpool3d")
def unpool(trace: Trace, call: Call) -> Any:
    """Put maxima back where they were: every channel alone."""
    x, places = call.args[:2]
    spatial = 2 if call.name == "aten::max_unpool2d" else 3
    out = trace.run(call)
    operands = [
        (_leading(trace, t, spatial, "pooled"), trace.operand(t, x.dim())[1]) for t in (x, places)
    ]
    return trace.label(out, meet(trace.table, operands, FIXED, trace.node))


@rule("affine_grid_generator")
def affine_grid(trace: Trace, call: Call) -> Any:
    """Coordinates of a resampling: neither they nor the transformations can change."""
    trace.freeze(call.args[0], "transformations of a resampling")
    return trace.run(call)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(trace: Trace, call: Call) -> Any:
    """Transform some dimensions, each element of which is a sum over all of them; the others keep their label."""
    x, dims = call.args[0], [d % call.args[0].dim() for d in call.args[1]]
    out = trace.run(call)
    fields = (
        trace.settle(f, set(dims) & set(f.dims), "Fourier transformed") for f in trace.fields(x)
    )
    return trace.label(out, tuple(f for f in fields if f is not None))
