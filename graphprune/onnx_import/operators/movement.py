"""Operators that move data: reshape, transpose, slice, concat, gather, pad, resize."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphprune.onnx_import.builder import Builder, Call
from graphprune.onnx_import.operators import operator

__all__: list[str] = []

_FAR = 2**31 - 1


def _as_sizes(b: Builder, value: Any) -> np.ndarray[Any, Any]:
    """Return integers as an object array."""
    if isinstance(value, np.ndarray):
        return value
    array = np.empty(tuple(value.shape), dtype=object)
    array[...] = np.array(value.tolist(), dtype=object).reshape(array.shape)
    return array


def _has_sizes(call: Call) -> bool:
    return any(isinstance(call.value(i), np.ndarray) for i in range(len(call)) if call.has(i))


@operator("Reshape")
def reshape(b: Builder, call: Call) -> Any:
    """Other sizes: 0 stands for the old one (unless ``allowzero``), -1 for what is left."""
    wanted: list[Any] = call.attr("shape") if call.opset < 5 else call.sizes(1) or []
    value = call.value(0)
    if isinstance(value, np.ndarray):
        return value.reshape(wanted)
    old = call.shape()
    if not call.attr("allowzero", 0):
        wanted = [old[i] if isinstance(w, int) and w == 0 else w for i, w in enumerate(wanted)]
    return b.call(torch.reshape, call.tensor(0), wanted)


@operator("Flatten")
def flatten(b: Builder, call: Call) -> Any:
    """Two dimensions: those before the axis, and the rest."""
    axis = call.attr("axis", 1)
    axis = axis + call.rank() if axis < 0 else axis
    x = call.tensor(0)
    if axis == 1:
        return b.call(torch.flatten, x, 1) if call.rank() > 1 else b.call(torch.unsqueeze, x, 1)
    rest = 1
    for one in call.shape()[axis:]:
        rest *= one
    return b.call(torch.reshape, x, [-1, rest])


@operator("Transpose")
def transpose(b: Builder, call: Call) -> Any:
    """Another order of the dimensions; the reverse where none is given."""
    order = list(call.attr("perm", list(reversed(range(call.rank())))))
    if order == list(range(len(order))):
        return call.value(0)
    return b.call(torch.permute, call.tensor(0), order)


@operator("Squeeze")
def squeeze(b: Builder, call: Call) -> Any:
    """Drop dimensions of size one."""
    axes = call.axes()
    value = call.value(0)
    if isinstance(value, np.ndarray):
        return value.reshape(()) if axes is None else np.squeeze(value, tuple(axes))
    if axes is None:
        axes = [i for i, s in enumerate(call.shape()) if isinstance(s, int) and s == 1]
    x = call.tensor(0)
    for axis in sorted((a % call.rank() for a in axes), reverse=True):
        x = b.call(torch.squeeze, x, axis)
    return x


@operator("Unsqueeze")
def unsqueeze(b: Builder, call: Call) -> Any:
    """Insert dimensions of size one."""
    axes = call.axes() or []
    value = call.value(0)
    if isinstance(value, np.ndarray):
        return np.expand_dims(value, tuple(axes))
    rank = call.rank() + len(axes)
    x = call.tensor(0)
    for axis in sorted(a % rank for a in axes):
        x = b.call(torch.unsqueeze, x, axis)
    return x


@operator("Concat")
def concat(b: Builder, call: Call) -> Any:
    """Join along a dimension."""
    if _has_sizes(call):
        known = [call.value(i) for i in range(len(call))]
        if all(isinstance(v, (np.ndarray, Tensor)) for v in known):
            return np.concatenate([_as_sizes(b, v) for v in known], axis=call.attr("axis"))
    return b.call(torch.cat, [call.tensor(i) for i in range(len(call))], call.attr("axis"))


@operator("Split")
def split(b: Builder, call: Call) -> Any:
    """Cut along a dimension, into given sizes or into equal parts."""
    axis, parts = call.attr("axis", 0), len(call.node.output)
    sizes = call.attr("split") or (call.sizes(1) if call.opset >= 13 else None)
    if sizes is None:
        total = call.shape()[axis]
        each = -(-total // parts)
        sizes = [each] * (parts - 1) + [total - each * (parts - 1)]
    return b.items(b.call(torch.split, call.tensor(0), list(sizes), axis), parts)


@operator("Slice")
def slice_(b: Builder, call: Call) -> Any:
    """Ranges along dimensions."""
    if call.opset < 10:
        starts, ends = list(call.attr("starts")), list(call.attr("ends"))
        axes, steps = call.attr("axes"), None
    else:
        starts, ends = call.sizes(1) or [], call.sizes(2) or []
        axes, steps = call.sizes(3), call.sizes(4)
    axes = [a % call.rank() for a in (axes or range(len(starts)))]
    steps = steps or [1] * len(starts)
    value = call.value(0)
    index: list[Any] = [slice(None)] * call.rank()
    reversed_dims = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = call.shape()[axis]
        if step == -1 and start in (-1, size - 1 if isinstance(size, int) else -1):
            if isinstance(end, int) and end < -_FAR // 2:
                reversed_dims.append(axis)
                continue
        if not isinstance(step, int) or step < 1:
            raise call.refuse(f"a step of {step}")
        index[axis] = slice(*_limits(b, start, end, size), None if step == 1 else step)
    if isinstance(value, np.ndarray):
        return value[tuple(index)]
    x = call.tensor(0)
    while index and index[-1] == slice(None):
        index.pop()
    if index:
        x = b.call(getitem, x, tuple(index))
    return b.call(torch.flip, x, reversed_dims) if reversed_dims else x


def _limits(b: Builder, start: Any, end: Any, size: Any) -> tuple[Any, Any]:
    """Return limits from zero on, None where they are those of the tensor."""

    def placed(limit: Any) -> Any:
        if not isinstance(limit, int) or not isinstance(size, int):
            return limit
        return min(max(0, limit + size if limit < 0 else limit), size)

    first, last = placed(start), placed(end)
    if isinstance(last, int) and (last >= _FAR or (isinstance(size, int) and last == size)):
        last = None
    if last is size:
        last = None
    return (None if isinstance(first, int) and first == 0 else first), last


@operator("Gather")
def gather(b: Builder, call: Call) -> Any:
    """Pick entries along a dimension by number; rows of a table are an embedding."""
    value = call.value(0)
    axis = call.attr("axis", 0) % max(1, call.rank())
    known = call.known(1)
    if isinstance(value, np.ndarray):
        if known is None:
            raise call.refuse("sizes are picked by numbers that are computed")
        return np.asarray(np.take(value, np.array(known.tolist(), dtype=np.int64), axis=axis))
    x = call.tensor(0)
    size = call.shape()[axis]
    if known is not None and known.dim() == 0:
        return b.call(torch.select, x, axis, int(known.item()))
    if known is not None and known.dim() == 1 and isinstance(size, int):
        rows = [int(i) % size for i in known.tolist()]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            picked = slice(rows[0], rows[0] + len(rows))
            return b.call(getitem, x, (*[slice(None)] * axis, picked))
        return b.call(torch.index_select, x, axis, torch.tensor(rows))
    if axis == 0 and call.rank() == 2 and b.weight_of(x) is not None:
        return b.call(F.embedding, call.tensor(1), x)
    return b.call(getitem, x, (*[slice(None)] * axis, call.tensor(1)))


@operator("GatherElements")
def gather_elements(b: Builder, call: Call) -> Any:
    """Pick single elements along a dimension."""
    return b.call(torch.gather, call.tensor(0), call.attr("axis", 0), call.tensor(1))


@operator("GatherND")
def gather_nd(b: Builder, call: Call) -> Any:
    """Pick by vectors of numbers, one for each of the leading dimensions."""
    if call.attr("batch_dims", 0):
        raise call.refuse("batch_dims other than 0")
    known = call.known(1)
    count = (known if known is not None else b.meta(call.value(1))[0]).shape[-1]
    size = call.shape()[0]
    if known is not None and known.dim() == 2 and count == 1 and isinstance(size, int):
        rows = [int(i) % size for i in known.flatten().tolist()]
        return b.call(torch.index_select, call.tensor(0), 0, torch.tensor(rows))
    numbers = call.tensor(1)
    columns = tuple(b.call(torch.select, numbers, -1, i) for i in range(count))
    return b.call(getitem, call.tensor(0), columns)


@operator("Expand")
def expand(b: Builder, call: Call) -> Any:
    """Repeat dimensions of size one, and new leading ones."""
    wanted, old = call.sizes(1) or [], call.shape()
    rank = max(len(wanted), len(old))
    wanted = [1] * (rank - len(wanted)) + list(wanted)
    have = [1] * (rank - len(old)) + old
    sizes = [h if isinstance(w, int) and w == 1 else w for w, h in zip(wanted, have, strict=True)]
    first = rank - len(old)
    # -1 keeps a size, so that what a cut changes there stays right.
    sizes = [-1 if i >= first and s is have[i] else s for i, s in enumerate(sizes)]
    if all(s == -1 if isinstance(s, int) else False for s in sizes):
        return call.value(0)
    return b.call("expand", call.tensor(0), *sizes)


@operator("Tile")
def tile(b: Builder, call: Call) -> Any:
    """Repeat the whole tensor along dimensions."""
    return b.call("repeat", call.tensor(0), *(call.sizes(1) or []))


@operator("Pad")
def pad(b: Builder, call: Call) -> Any:
    """A border: constant, reflected or repeated; negative widths take away."""
    mode = call.attr("mode", "constant")
    widths = list(call.attr("pads")) if call.opset < 11 else call.const(1)
    value = call.attr("value", 0.0) if call.opset < 11 else call.const(2, 0.0)
    value = value[0] if isinstance(value, list) else value
    rank = call.rank()
    axes = [int(a) % rank for a in call.const(3)] if call.has(3) else list(range(rank))
    low, high = [0] * rank, [0] * rank
    for position, axis in enumerate(axes):
        low[axis], high[axis] = int(widths[position]), int(widths[position + len(axes)])
    pairs = list(zip(low, high, strict=True))
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    if not pairs:
        return call.value(0)
    flat = [w for pair in reversed(pairs) for w in pair]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode == "constant":
        return b.call(F.pad, call.tensor(0), flat, "constant", value)
    return b.call(F.pad, call.tensor(0), flat, modes[mode])


@operator("DepthToSpace")
def depth_to_space(b: Builder, call: Call) -> Any:
    """Channels to space; CRD is torch's pixel shuffle, DCR has the block outermost."""
    x, block = call.tensor(0), call.attr("blocksize")
    if call.attr("mode", "DCR") == "CRD":
        return b.call(F.pixel_shuffle, x, block)
    n, c, h, w = call.shape()
    x = b.call(torch.reshape, x, [n, block, block, c // (block * block), h, w])
    x = b.call(torch.permute, x, [0, 3, 4, 1, 5, 2])
    return b.call(torch.reshape, x, [n, c // (block * block), h * block, w * block])


@operator("SpaceToDepth")
def space_to_depth(b: Builder, call: Call) -> Any:
    """Space to channels, the block outermost."""
    x, block = call.tensor(0), call.attr("blocksize")
    n, c, h, w = call.shape()
    x = b.call(torch.reshape, x, [n, c, h // block, block, w // block, block])
    x = b.call(torch.permute, x, [0, 3, 5, 1, 2, 4])
    return b.call(torch.reshape, x, [n, c * block * block, h // block, w // block])


_RESIZES = {
    ("nearest", "asymmetric", "floor"): ("nearest", None),
    ("nearest", "half_pixel", "round_prefer_ceil"): ("nearest-exact", None),
    ("linear", "half_pixel", ""): ("linear", False),
    ("linear", "pytorch_half_pixel", ""): ("linear", False),
    ("linear", "align_corners", ""): ("linear", True),
    ("cubic", "half_pixel", ""): ("cubic", False),
    ("cubic", "pytorch_half_pixel", ""): ("cubic", False),
    ("cubic", "align_corners", ""): ("cubic", True),
}
_BY_RANK = {
    ("linear", 1): "linear",
    ("linear", 2): "bilinear",
    ("linear", 3): "trilinear",
    ("cubic", 2): "bicubic",
}


@operator("Resize", "Upsample")
def resize(b: Builder, call: Call) -> Any:
    """Resample space, in the forms that torch has."""
    is_upsample = call.node.op_type == "Upsample"
    mode = call.attr("mode", "nearest")
    place = call.attr(
        "coordinate_transformation_mode", "asymmetric" if is_upsample else "half_pixel"
    )
    rounding = call.attr("nearest_mode", "floor" if is_upsample else "round_prefer_floor")
    position = 1 if is_upsample or call.opset < 11 else 2
    scales = call.attr("scales") or (call.const(position) if call.has(position) else None)
    sizes = call.sizes(3) if call.has(3) else None
    shape = call.shape()
    axes = call.attr("axes")
    if axes is not None:
        full_scales, full_sizes = [1.0] * len(shape), list(shape)
        for i, axis in enumerate(axes):
            if scales:
                full_scales[axis] = scales[i]
            if sizes:
                full_sizes[axis] = sizes[i]
        scales, sizes = (full_scales if scales else None), (full_sizes if sizes else None)
    chosen = _RESIZES.get((mode, place, rounding if mode == "nearest" else ""))
    repeats = scales is not None and all(float(s).is_integer() and s >= 1 for s in scales)
    if mode == "nearest" and repeats and place in ("half_pixel", "pytorch_half_pixel"):
        chosen = ("nearest", None)  # by a whole factor, however the middle is rounded
    if mode == "cubic" and call.attr("cubic_coeff_a", -0.75) != -0.75:
        chosen = None
    name = None if chosen is None else _name(chosen[0], len(shape) - 2)
    if (
        chosen is None
        or name is None
        or call.attr("antialias", 0)
        or call.attr("exclude_outside", 0)
    ):
        raise call.refuse(f"torch has no resampling {mode}, {place}, {rounding}")
    options: dict[str, Any] = {} if chosen[1] is None else {"align_corners": chosen[1]}
    if sizes:
        return b.call(F.interpolate, call.tensor(0), list(sizes[2:]), None, name, **options)
    factors = [float(s) for s in (scales or [])[2:]]
    return b.call(F.interpolate, call.tensor(0), None, factors, name, **options)


def _name(mode: str, rank: int) -> str | None:
    return mode if mode.startswith("nearest") else _BY_RANK.get((mode, rank))


@operator("Trilu")
def triangle(b: Builder, call: Call) -> Any:
    """The upper or lower triangle."""
    function = torch.triu if call.attr("upper", 1) else torch.tril
    return b.call(function, call.tensor(0), int(call.const(1, 0)))


@operator("ScatterND")
def scatter_nd(b: Builder, call: Call) -> Any:
    """Write rows at known places of a copy."""
    if call.attr("reduction", "none") != "none":
        raise call.refuse("values are added at their places")
    index = call.known(1)
    if index is None:
        raise call.refuse("the places are computed")
    places = tuple(index.unbind(-1))
    return b.call(torch.index_put, call.tensor(0), places, call.tensor(2))


@operator("OneHot")
def one_hot(b: Builder, call: Call) -> Any:
    """A row of zeros with a one, of known depth."""
    depth = int(_first(call.const(1)))
    off, on = call.const(2)
    if call.attr("axis", -1) != -1:
        raise call.refuse("an axis other than the last")
    dtype = b.meta(call.value(2))[0].dtype
    hot = b.call("to", b.call(F.one_hot, b.call("to", call.tensor(0), torch.int64), depth), dtype)
    return hot if (off, on) == (0, 1) else b.call(torch.add, b.call(torch.mul, hot, on - off), off)


def _first(value: Sequence[Any] | Any) -> Any:
    return value[0] if isinstance(value, list) else value
