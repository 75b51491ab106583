"""What graph nodes hold as sizes: one row per operation that takes a size.

The same operation has many names: ``torch.reshape``, ``Tensor.reshape``, ``aten.reshape.default``. Rows are
keyed by the bare name. A row gets a `Site` and rewrites the node's arguments where the cut changes them, and
only there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from graphprune.cut.numbers import Numbers
from graphprune.cut.shapes import Shapes
from graphprune.errors import AnalysisError
from graphprune.labels.strides import distance_of, steps_of
from graphprune.labels.trace import TensorInfo

__all__ = ["LiteralChange", "literals_of", "pad_widths", "rewrite_literals"]


@dataclass(frozen=True)
class LiteralChange:
    """A size that was rewritten in the graph."""

    node: str
    argument: str
    old: str
    new: str
    sizes: tuple[tuple[int, int], ...] = ()
    """Every plain number of the argument, before and after."""


@dataclass
class Site:
    """A node at which sizes may have to be rewritten, and the verbs to do it."""

    node: fx.Node
    shapes: Shapes
    numbers: Numbers
    other_batch: Numbers
    name: str
    done: set[fx.Node]
    """Number-valued arguments that a row has dealt with."""

    def info(self, argument: Any) -> TensorInfo:
        """Return what is known of a tensor argument."""
        found = self.shapes.info(argument)
        if found is None:
            raise AnalysisError(f"node {self.node.name}: argument {argument} is not one tensor")
        return found

    @property
    def out(self) -> TensorInfo:
        """Return what is known of the output."""
        return self.info(self.node)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def put(self, position: int, name: str, value: Any) -> None:
        """Write an argument by position or name."""
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def size(self, argument: Any, wanted: int, *, spare: bool = False) -> Any:
        """Return what to write for a size: the argument itself where it is right already.

        Args:
            argument: An int or a number-valued node.
            wanted: The size that the cut program has here.
            spare: Whether -1 ("what is left") may be written for a size that follows the batch.
        """
        if isinstance(argument, fx.Node):
            self.done.add(argument)
        value = self.numbers.value(argument)
        if not isinstance(value, int) or value == -1 or value == wanted:
            return argument
        if isinstance(argument, fx.Node) and value != self.other_batch.value(argument):
            if spare:
                return -1
            raise AnalysisError(
                f"node {self.node.name}: a size follows both the batch and the number of channels "
                f"({value}, should be {wanted}), and cannot be rewritten. Capture with a fixed batch."
            )
        return wanted


Row = Callable[[Site], None]
_ROWS: dict[str, Row] = {}


def literals_of(*names: str) -> Callable[[Row], Row]:
    """Register a row for operations of these bare names."""

    def register(function: Row) -> Row:
        _ROWS.update(dict.fromkeys(names, function))
        return function

    return register


def rewrite_literals(graph: fx.Graph, shapes: Shapes) -> list[LiteralChange]:
    """Rewrite every size in the graph that the cut changes, and return what was rewritten."""
    numbers = Numbers(shapes, batch=shapes.batch)
    other = Numbers(shapes, batch=shapes.batch + 1)
    changes: list[LiteralChange] = []
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        if _bare_name(node) == "setitem":
            before = (node.args, dict(node.kwargs), node.target)
            _rewrite(node, shapes, numbers, other)
            changes += _differences(node, before)
            continue
        if not _holds_tensor(shapes.values[node.name]):
            numbers.number(node)
            other.number(node)
            continue
        if node.op in ("call_function", "call_method"):
            before = (node.args, dict(node.kwargs), node.target)
            _rewrite(node, shapes, numbers, other)
            changes += _differences(node, before)
    return changes


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, TensorInfo)


def _bare_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _rewrite(node: fx.Node, shapes: Shapes, numbers: Numbers, other: Numbers) -> None:
    name = _bare_name(node)
    site = Site(node, shapes, numbers, other, name, set())
    if row := _ROWS.get(name.removesuffix("_") if name not in _ROWS else name):
        row(site)
    _restore_scales(site)


def _restore_scales(site: Site) -> None:
    """Give back their old values to numbers that are no sizes (``head_dim ** -0.5``) and that the cut would change."""

    def restore(argument: fx.Node) -> Any:
        if argument in site.done:
            return argument
        old = site.shapes.values[argument.name]
        if _holds_tensor(old):
            return argument
        if not isinstance(old, (int, float)) or old == site.numbers.value(argument):
            return argument
        return old

    site.node.args = map_arg(site.node.args, restore)
    site.node.kwargs = map_arg(site.node.kwargs, restore)


def _differences(node: fx.Node, before: tuple[Any, dict[str, Any], Any]) -> list[LiteralChange]:
    args, kwargs, target = before
    changes = []
    if node.target is not target:
        changes.append(LiteralChange(node.name, "target", str(target), str(node.target)))
    for name, old, new in (("args", args, node.args), ("kwargs", kwargs, dict(node.kwargs))):
        if new != old:
            changes.append(LiteralChange(node.name, name, str(old), str(new), _numbers(old, new)))
    return changes


def _numbers(old: Any, new: Any) -> tuple[tuple[int, int], ...]:
    """Return the plain numbers that stand at the same places of nested arguments."""
    pairs = zip(tree_leaves(old), tree_leaves(new), strict=False)
    return tuple((a, b) for a, b in pairs if type(a) is int and type(b) is int)


# -- sizes of the output ------------------------------------------------------------------------------------------


def _write_sizes(site: Site, first: int, wanted: Sequence[int], *, spare: bool) -> None:
    """Rewrite sizes given as one sequence or as separate arguments from position `first` on."""
    args = site.node.args
    given = (
        args[first]
        if len(args) > first
        else site.node.kwargs.get("size", site.node.kwargs.get("shape"))
    )
    if isinstance(given, (list, tuple)):
        sizes = _sizes(site, given, wanted, spare=spare)
        if list(sizes) != list(given):
            if len(args) > first:
                site.node.update_arg(
                    first, type(given)(sizes) if type(given) is list else tuple(sizes)
                )
            else:
                site.node.update_kwarg(
                    "size" if "size" in site.node.kwargs else "shape", tuple(sizes)
                )
        return
    if len(args) > first and isinstance(site.numbers.value(given), (tuple, list)):
        _write_shape(site, first, given, wanted, spare=spare)  # type: ignore[arg-type]
        return
    sizes = _sizes(site, args[first:], wanted, spare=spare)
    if list(sizes) != list(args[first:]):
        site.node.args = (*args[:first], *sizes)


def _write_shape(
    site: Site, position: int, given: fx.Node, wanted: Sequence[int], *, spare: bool
) -> None:
    """Rewrite a shape that the graph computes as a whole (``x.shape[:-1] + (-1,)``); the batch stays computed."""
    site.done.add(given)
    old, other = list(site.numbers.value(given)), list(site.other_batch.value(given))
    sizes: list[Any] = []
    for value, elsewhere, size in zip(old, other, wanted, strict=True):
        if value in (-1, size) or value == elsewhere:
            sizes.append(value if value == -1 else size)
        elif spare and -1 not in (*old, *sizes):
            sizes.append(-1)
        else:
            raise AnalysisError(
                f"node {site.node.name}: a size follows both the batch and the number of channels "
                f"({value}, should be {size}), and cannot be rewritten. Capture with a fixed batch."
            )
    if sizes == old:
        return
    for index, (value, elsewhere) in enumerate(zip(old, other, strict=True)):
        if value != elsewhere and sizes[index] != -1:
            with site.node.graph.inserting_before(site.node):
                sizes[index] = site.node.graph.call_function(operator.getitem, (given, index))
            site.done.add(sizes[index])
    site.node.update_arg(position, tuple(sizes))


def _sizes(site: Site, given: Sequence[Any], wanted: Sequence[int], *, spare: bool) -> list[Any]:
    result = [
        site.size(g, w, spare=spare and -1 not in [site.numbers.value(o) for o in given])
        for g, w in zip(given, wanted, strict=True)
    ]
    if sum(1 for r in result if isinstance(r, int) and r == -1) > 1 and spare:
        raise AnalysisError(f"node {site.node.name}: more than one size would have to be inferred")
    return result


@literals_of("view", "reshape", "_unsafe_view")
def _view(site: Site) -> None:
    if isinstance(site.arg(1, "size"), torch.dtype):
        return
    _write_sizes(site, 1, site.shapes.shape(site.out), spare=True)


@literals_of("expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full")
def _expand(site: Site) -> None:
    _write_sizes(site, 1, site.shapes.shape(site.out), spare=False)


@literals_of("zeros", "ones", "empty", "full")
def _factory(site: Site) -> None:
    _write_sizes(site, 0, site.shapes.shape(site.out), spare=False)


@literals_of("unflatten")
def _unflatten(site: Site) -> None:
    dim = site.arg(1, "dim") % len(site.info(site.node.args[0]).shape)
    given = site.arg(2, "sizes")
    wanted = site.shapes.shape(site.out)[dim : dim + len(given)]
    site.put(2, "sizes", type(given)(_sizes(site, given, wanted, spare=True)))


@literals_of("repeat", "tile")
def _repeat(site: Site) -> None:
    source, out = site.info(site.node.args[0]), site.out
    shift = len(out.shape) - len(source.shape)
    ins = [1] * shift + list(site.shapes.shape(source))
    wanted = [o // max(1, i) for o, i in zip(site.shapes.shape(out), ins, strict=True)]
    if site.shapes.changed(out):
        given = site.arg(1, "repeats", site.node.kwargs.get("dims"))
        count = len(given) if isinstance(given, (tuple, list)) else len(site.node.args) - 1
        _write_sizes(site, 1, wanted[-count:], spare=False)


@literals_of("repeat_interleave")
def _repeat_interleave(site: Site) -> None:
    source, dim = site.info(site.node.args[0]), site.arg(2, "dim")
    repeats = site.arg(1, "repeats")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return
    dim %= len(source.shape)
    before, after = site.shapes.size(source, dim), site.shapes.size(site.out, dim)
    if before and after % before == 0 and after != before * repeats:
        site.put(1, "repeats", after // before)


@literals_of("as_strided")
def _as_strided(site: Site) -> None:
    """Strides are distances: the same steps along the dimensions of what is left."""
    source = site.info(site.node.args[0])
    if not site.shapes.changed(source):
        return
    shape = site.shapes.shape(source)

    def moved(distance: Any) -> Any:
        old = site.shapes.values[distance.name] if isinstance(distance, fx.Node) else distance
        steps = steps_of(old, source.shape)
        return site.size(distance, distance_of(steps, shape))

    site.put(1, "size", _sizes(site, site.arg(1, "size"), site.shapes.shape(site.out), spare=False))
    site.put(2, "stride", [moved(distance) for distance in site.arg(2, "stride")])
    if site.arg(3, "storage_offset"):
        site.put(3, "storage_offset", moved(site.arg(3, "storage_offset")))


# -- ranges -------------------------------------------------------------------------------------------------------


@literals_of("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(site: Site) -> None:
    parts = site.shapes.values[site.node.name]
    dim = site.arg(2, "dim", 0) % len(parts[0].shape)
    if not any(site.shapes.changed(p) for p in parts):
        return
    sizes = site.shapes.sizes(parts, dim)
    total = sum(sizes)
    given = site.arg(1, "split_size")
    if isinstance(given, fx.Node):
        site.done.add(given)
    if "chunk" in site.name:
        step = -(-total // site.numbers.value(site.arg(1, "chunks")))
    elif isinstance(site.numbers.value(given), int) and site.name in ("split", "unsafe_split"):
        step = sizes[0]
    else:
        step = 0
    if step and sizes == [min(step, total - i) for i in range(0, total, step)]:
        if "chunk" not in site.name:
            site.put(1, "split_size", site.size(given, step))
        return
    source = site.node.args[0]
    site.node.op = "call_function"
    site.node.target = torch.ops.aten.split_with_sizes.default
    site.node.args = (source, sizes, dim)
    site.node.kwargs = {}


@literals_of("narrow")
def _narrow(site: Site) -> None:
    source = site.info(site.node.args[0])
    dim = site.arg(1, "dim") % len(source.shape)
    start = site.numbers.value(site.arg(2, "start"))
    start %= source.shape[dim]
    site.put(
        2, "start", site.size(site.arg(2, "start"), site.shapes.kept_in(source, dim, 0, start))
    )
    site.put(3, "length", site.size(site.arg(3, "length"), site.shapes.size(site.out, dim)))


@literals_of("slice")
def _slice(site: Site) -> None:
    _put_range(site, 1)


@literals_of("slice_scatter")
def _slice_scatter(site: Site) -> None:
    _put_range(site, 2)


def _put_range(site: Site, first: int) -> None:
    """Write the new ends into a node whose arguments from `first` on are dim, start, end, step."""
    source = site.info(site.node.args[0])
    dim = site.arg(first, "dim", 0) % len(source.shape)
    old = site.arg(first + 1, "start"), site.arg(first + 2, "end")
    new = _range(site, source, dim, *old, site.arg(first + 3, "step"))
    for position, name in enumerate(("start", "end")):
        if new[position] != old[position]:
            site.put(first + 1 + position, name, new[position])


def _range(
    site: Site, source: TensorInfo, dim: int, start: Any, stop: Any, step: Any
) -> tuple[Any, Any]:
    """Return the new ends of ``start:stop:step`` along `dim`."""
    if site.shapes.size(source, dim) == source.shape[dim]:
        return start, stop
    for end in (start, stop):
        if isinstance(end, fx.Node):
            site.done.add(end)
    # The old ends, in the old numbers: a computed end is taken from the dense run.
    old = [site.shapes.values[e.name] if isinstance(e, fx.Node) else e for e in (start, stop)]
    first, last, _ = slice(*old).indices(source.shape[dim])
    # Runs of `step` neighbours stay or go together, so the place within a run is what it was.
    inside = first % (step or 1)
    new_start = site.shapes.kept_in(source, dim, 0, first - inside) + inside
    new_stop = site.shapes.kept_in(source, dim, 0, last)
    return (None if old[0] is None else new_start), (None if old[1] is None else new_stop)


@literals_of("getitem", "setitem")
def _getitem(site: Site) -> None:
    if site.shapes.info(site.node.args[0]) is None:
        return
    source = site.info(site.node.args[0])
    index: Any = site.node.args[1]
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    result: list[Any] = []
    dim = 0
    for item in items:
        if item is None:
            result.append(item)
            continue
        if item is Ellipsis:
            dim += len(source.shape) - used
            result.append(item)
            continue
        if isinstance(item, slice):
            start, stop = _range(site, source, dim, item.start, item.stop, item.step)
            item = slice(start, stop, item.step)
        result.append(item)
        dim += 1
    if result != items:
        site.node.update_arg(1, tuple(result) if isinstance(index, (tuple, list)) else result[0])


@literals_of("roll")
def _roll(site: Site) -> None:
    source = site.info(site.node.args[0])
    shifts, dims = site.arg(1, "shifts"), site.arg(2, "dims", ())
    if (not dims and dims != 0) or not site.shapes.changed(source):
        return
    single = isinstance(dims, int)
    wanted = []
    for shift, dim in zip([shifts] if single else shifts, [dims] if single else dims, strict=True):
        axis, size = dim % len(source.shape), source.shape[dim]
        value = site.shapes.values[shift.name] if isinstance(shift, fx.Node) else shift
        if isinstance(shift, fx.Node):
            site.done.add(shift)
        round_ = value % size
        kept = site.shapes.kept_in(source, axis, size - round_, size)
        wanted.append(shift if kept == round_ else kept)
    site.put(1, "shifts", wanted[0] if isinstance(shifts, (int, fx.Node)) else type(shifts)(wanted))


# -- the rest -----------------------------------------------------------------------------------------------------


def pad_widths(
    shapes: Shapes, before: TensorInfo, after: TensorInfo, widths: Sequence[int]
) -> list[int]:
    """Return the new widths of a constant border."""
    result = list(widths)
    rank = len(before.shape)
    for pair in range(len(widths) // 2):
        dim = rank - 1 - pair
        low, high = widths[2 * pair], widths[2 * pair + 1]
        end_in, end_out = before.shape[dim], after.shape[dim]
        result[2 * pair] = (
            shapes.kept_in(after, dim, 0, low)
            if low >= 0
            else -shapes.kept_in(before, dim, 0, -low)
        )
        result[2 * pair + 1] = (
            shapes.kept_in(after, dim, end_out - high, end_out)
            if high >= 0
            else -shapes.kept_in(before, dim, end_in + high, end_in)
        )
    return result


@literals_of("pad", "constant_pad_nd")
def _pad(site: Site) -> None:
    before, after = site.info(site.node.args[0]), site.out
    if not site.shapes.changed(before) and not site.shapes.changed(after):
        return
    given: Any = site.arg(1, "pad")
    old = [site.shapes.values[g.name] if isinstance(g, fx.Node) else g for g in given]
    widths = pad_widths(site.shapes, before, after, old)
    # A width of -1 takes one channel away; it is no size to be inferred.
    pairs = zip(given, widths, strict=True)
    site.put(1, "pad", type(given)(w if isinstance(g, int) else site.size(g, w) for g, w in pairs))


@literals_of("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(site: Site) -> None:
    source = site.info(site.node.args[0])
    given: Any = site.arg(1, "normalized_shape")
    if isinstance(given, fx.Node):
        site.done.add(given)
        return
    wanted = site.shapes.shape(source)[len(source.shape) - len(given) :]
    site.put(1, "normalized_shape", type(given)(_sizes(site, given, wanted, spare=False)))


@literals_of("group_norm")
def _group_norm(site: Site) -> None:
    source, groups = site.info(site.node.args[0]), site.arg(1, "num_groups")
    if groups == source.shape[1]:
        site.put(1, "num_groups", site.size(groups, site.shapes.size(source, 1)))


@literals_of("native_group_norm")
def _native_group_norm(site: Site) -> None:
    source, groups = site.info(site.node.args[0]), site.node.args[6]
    channels = site.shapes.size(source, 1)
    site.put(4, "C", site.size(site.node.args[4], channels))
    if groups == source.shape[1]:
        site.put(6, "group", site.size(groups, channels))


@literals_of("conv1d", "conv2d", "conv3d")
def _convolution(site: Site) -> None:
    _write_groups(site, 6, site.info(site.node.args[0]))


@literals_of("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(site: Site) -> None:
    _write_groups(site, 6, site.out)


@literals_of("convolution", "_convolution")
def _any_convolution(site: Site) -> None:
    _write_groups(site, 8, site.out if site.node.args[6] else site.info(site.node.args[0]))


def _write_groups(site: Site, position: int, split: TensorInfo) -> None:
    """Rewrite the number of groups, each of as many channels of `split` as the weight's second dimension has."""
    groups = site.arg(position, "groups", 1)
    if groups == 1:
        return
    weight = site.info(site.node.args[1])
    channel = len(split.shape) - len(weight.shape) + 1
    wanted = site.shapes.size(split, channel) // site.shapes.size(weight, 1)
    site.put(position, "groups", site.size(groups, wanted))


@literals_of("scaled_dot_product_attention")
def _attention(site: Site) -> None:
    query = site.info(site.node.args[0])
    last = len(query.shape) - 1
    if site.node.kwargs.get("scale") is None and site.shapes.size(query, last) != query.shape[last]:
        site.node.update_kwarg("scale", 1.0 / math.sqrt(query.shape[last]))


@literals_of("mean")
def _mean(site: Site) -> None:
    """A mean over channels is a sum, divided by as many as there were: the divisor is a scale."""
    if site.node.name not in site.shapes.means:
        return
    source = site.info(site.node.args[0])
    rank = len(source.shape)
    given = site.arg(1, "dim")
    dims = [d % rank for d in ([given] if isinstance(given, int) else given or range(rank))]
    if all(site.shapes.size(source, d) == source.shape[d] for d in dims):
        return
    keepdim = bool(site.arg(2, "keepdim", False))
    with site.node.graph.inserting_before(site.node):
        total = site.node.graph.call_function(
            torch.ops.aten.sum.dim_IntList,
            (site.node.args[0], dims, keepdim),
            {k: v for k, v in site.node.kwargs.items() if k == "dtype"},
        )
    total.meta = dict(site.node.meta)
    site.done.add(total)
    site.node.op, site.node.target = "call_function", torch.ops.aten.div.Tensor
    site.node.args = (total, float(math.prod(source.shape[d] for d in dims)))
    site.node.kwargs = {}
