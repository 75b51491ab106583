"""The promise: every cut is proven exact by running it.

A removal is exact when the smaller program equals the original program in which the removed channels are zero *at their
consumers*: wherever the original sums over a removed channel, it finds a zero there; where it takes statistics over
channels (layer, group, RMS norm), it takes them over the kept ones. Both programs run side by side on random
inputs, node by node, and every tensor of the original, restricted to what is kept, must equal its counterpart.
So a cut that falls short is caught at the first node that differs, even where the outputs hide it.

Other surgeries (clean-up, folding) promise equal outputs; there only the outputs are compared.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from graphprune.check import Check
from graphprune.cost import Keep
from graphprune.errors import VerifyError
from graphprune.groups import DependencyGroups
from graphprune.labels.rules import find_rule
from graphprune.labels.trace import Consumer, TensorInfo
from graphprune.program import Program

__all__ = [
    "Differs",
    "MaskMode",
    "Masked",
    "Promote",
    "assert_exact",
    "relative",
    "restrict",
    "verify_surgery",
]

SAMPLES = 2
"""How many random samples both programs run on, unless labels were found for another number."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference, relative to the largest value of the tensor: sums in another order differ by rounding
alone, which grows with depth; a wrong channel differs by the size of the values themselves."""


@dataclass(frozen=True)
class Masked:
    """Reference of a channel removal: the program that came in, with removed channels zero at their consumers."""

    groups: DependencyGroups
    keep: Keep

    @property
    def atoms(self) -> NDArray[np.bool_]:
        """Which atoms stay."""
        return self.keep[self.groups.channel_of]


def assert_exact(
    before: Program, after: Program, reference: Masked | Program | None = None
) -> None:
    """Raise unless `after` is what surgery promised to make of `before`.

    Raises:
        VerifyError: Something differs; names the first node that does.
    """
    check = verify_surgery(before, after, reference)
    if not check.passed:
        raise VerifyError(f"the surgery is not exact: {check.detail}")


def verify_surgery(
    before: Program, after: Program, reference: Masked | Program | None = None
) -> Check:
    """Run the program before and after a surgery on the same random inputs and compare.

    Args:
        before: The program that went in.
        after: The program that came out.
        reference: What went in must be masked like this, or what stands in for it; None: the outputs must simply be
            equal.

    Returns:
        The largest relative difference, float64 where both programs fit into memory, else float32.
    """
    what = "program before"
    if isinstance(reference, Program):
        before, reference, what = reference, None, "program with silent branches"
    elif reference is not None:
        what = "masked program"
    dtype = torch.float64 if _fits(before, after) else torch.float32
    tolerance = TOLERANCE[dtype]
    before, after = (_as(p, dtype) for p in (before, after))
    # A label over batch and channels in one dimension (attention written for ``batch * heads``) fits one batch only.
    samples = SAMPLES if reference is None else reference.groups.labels.batch
    inputs = before.batch(samples, seed=1, dtype=dtype)
    if before.dialect == "module":
        inputs = before.example_inputs
    with torch.inference_mode(), _default_dtype(dtype):
        try:
            worst = _compare(before, after, inputs, reference, tolerance)
        except Differs as error:
            return Check(
                max_abs_err=error.difference, tolerance=tolerance, passed=False, detail=str(error)
            )
    if before.dialect == "module":
        what += ", module by module and in every output,"
        inputs_text = f"the {len(inputs)} example inputs"
    else:
        inputs_text = f"{samples} random samples"
    detail = f"{str(dtype).removeprefix('torch.')}, {what} on {inputs_text}, relative to the largest value"
    return Check(max_abs_err=worst, tolerance=tolerance, passed=worst <= tolerance, detail=detail)


class Differs(Exception):
    """The two programs do not compute the same."""

    def __init__(self, message: str, difference: float | None = None) -> None:
        super().__init__(message)
        self.difference = difference


def _fits(before: Program, after: Program) -> bool:
    elements = sum(t.numel() for p in (before, after) for _, t in p.named_tensors())
    return 8 * elements < 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _as(program: Program, dtype: torch.dtype) -> Program:
    if all(t.dtype == dtype for _, t in program.named_tensors() if t.is_floating_point()):
        return program
    return program.map_floating(lambda t: t.to(dtype))


class _default_dtype:
    """Make constants that the graph creates as precise as the comparison."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.previous)


def _compare(
    before: Program,
    after: Program,
    inputs: tuple[Tensor, ...],
    reference: Masked | None,
    tolerance: float,
) -> float:
    dtype = TOLERANCE_DTYPES[tolerance]
    if reference is None:
        given = [tuple(t.clone() for t in inputs) for _ in range(2)]
        with Promote(dtype):
            old = before.module(*given[0])
            try:
                new = after.module(*given[1])
            except RuntimeError as error:
                raise Differs(f"the program does not run any more: {error}") from error
        # The inputs as well: a program may write into what it is given.
        return max(_outputs(old, new), _outputs(*given))
    if before.dialect == "module":
        from graphprune.verify_whole import compare_whole

        return compare_whole(before, after, inputs, reference, tolerance)
    mask = MaskMode(dtype, reference)
    names = {node.name for node in before.module.graph.nodes}
    cut = _run(after.module, inputs, Promote(dtype))
    # A cut may write one node as two (a mean as a sum and a division); the last one keeps the name.
    counterparts = ((node, value) for node, value in cut if node.name in names)
    runs = zip(_run(before.module, inputs, mask), counterparts, strict=True)
    worst = 0.0
    while True:
        try:
            (node, old), (_, new) = next(runs)
        except StopIteration:
            return worst
        except RuntimeError as error:
            raise Differs(f"the cut program does not run: {error}") from error
        info = reference.groups.labels.values[node.name]
        source = reference.groups.labels.sources.get(str(node.target))
        if source is not None and node.op == "get_attr":
            old = source.renumbered(old, reference.atoms)
        difference = _difference(info, old, new, reference.atoms, node)
        if not difference <= tolerance:
            raise Differs(
                f"node {node.name} ({node.op} {node.target}) is the first that differs: by {difference:.3g} of its "
                f"largest value, tolerance {tolerance:g}",
                difference,
            )
        worst = max(worst, difference)


TOLERANCE_DTYPES = {tolerance: dtype for dtype, tolerance in TOLERANCE.items()}


def _outputs(old: Any, new: Any) -> float:
    a = [t for t in tree_leaves(old) if isinstance(t, Tensor)]
    b = [t for t in tree_leaves(new) if isinstance(t, Tensor)]
    if [t.shape for t in a] != [t.shape for t in b]:
        raise Differs(
            f"outputs have shapes {[tuple(t.shape) for t in b]}, expected {[tuple(t.shape) for t in a]}"
        )
    return max((relative(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def relative(old: Tensor, new: Tensor) -> float:
    """Return the largest difference, relative to the largest value; NaN where only one side is finite."""
    if not old.numel():
        return 0.0
    if old.is_complex() and new.is_complex():
        return relative(
            torch.view_as_real(old.resolve_conj()), torch.view_as_real(new.resolve_conj())
        )
    if not old.is_floating_point():
        return 0.0 if torch.equal(old, new) else math.inf
    same = (old == new) | (old.isnan() & new.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, 0.0, (old - new).abs()).max().item()
    scale = old[old.isfinite()].abs().max().item() if bool(old.isfinite().any()) else 0.0
    return gap / scale if scale > 0 else math.inf


def _difference(info: Any, old: Any, new: Any, atoms: NDArray[np.bool_], node: fx.Node) -> float:
    if isinstance(info, TensorInfo) and isinstance(old, Tensor):
        kept = restrict(info, old, atoms)
        if kept.shape != new.shape:
            raise Differs(
                f"node {node.name} ({node.op} {node.target}) has shape {tuple(new.shape)}, expected {tuple(kept.shape)}"
            )
        return relative(kept, new)
    if isinstance(info, (tuple, list)):
        pairs = zip(info, old, new, strict=True)
        return max((_difference(i, a, b, atoms, node) for i, a, b in pairs), default=0.0)
    if isinstance(info, dict):
        return max(
            (_difference(i, old[k], new[k], atoms, node) for k, i in info.items()), default=0.0
        )
    return 0.0


def restrict(info: TensorInfo, value: Tensor, atoms: NDArray[np.bool_]) -> Tensor:
    """Return `value` without the elements whose atoms are gone."""
    done: set[int] = set()
    for field in info.fields:
        kept = atoms[field.atoms]
        if kept.all():
            continue
        for axis, dim in enumerate(field.dims):
            if dim in done:  # blocks that are gone have gone with another label
                others = tuple(a for a in range(kept.ndim) if a != axis)
                kept = kept.compress(kept.any(axis=others), axis=axis)
        done |= set(field.dims)
        if len(field.dims) == 1:
            value = value.index_select(field.dims[0], torch.from_numpy(np.flatnonzero(kept)))
            continue
        value = _restrict_joint(value, field.dims, kept)
    return value


def _restrict_joint(value: Tensor, dims: tuple[int, ...], kept: NDArray[np.bool_]) -> Tensor:
    """Pick the kept elements over several dimensions, packed in nesting order."""
    others = [d for d in range(value.dim()) if d not in dims]
    moved = value.permute([*others, *dims])
    picked: list[Any] = [slice(None)] * len(others) + [torch.from_numpy(kept)]
    flat = moved[tuple(picked)]
    sizes = []
    for axis in range(kept.ndim):
        present = kept.any(axis=tuple(range(axis + 1, kept.ndim))) if axis + 1 < kept.ndim else kept
        sizes.append(int(present.sum(axis=axis).max()))
    packed = flat.reshape(*flat.shape[:-1], *sizes)
    order = [*others, *dims]
    return packed.permute([order.index(d) for d in range(value.dim())])


def _run(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], mode: Promote
) -> Iterator[tuple[fx.Node, Any]]:
    """Run a graph under `mode`, yielding every node with its value; values are dropped after their last use."""
    interpreter = fx.Interpreter(module)
    feed = iter(inputs)
    env: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        mode.enter(node.name)
        with mode:
            if node.op == "placeholder":
                env[node] = next(feed, node.args[0] if node.args else None)
            else:
                env[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        # In-place operators write into their input, so both programs are compared right after each node.
        yield node, env[node]
        for used in interpreter.user_to_last_uses.get(node, ()):
            env.pop(used, None)


_UNDEFINED = frozenset(
    """empty empty_like empty_strided empty_permuted new_empty new_empty_strided rand rand_like randn randn_like
    bernoulli normal_ uniform_ bernoulli_""".split()
)
"""Operators whose values are those of no channel, and other ones at every run."""


def _defined(func: Any, result: Any) -> Any:
    """Return what an operator returned, filled with one number where its values mean nothing."""
    name = func._schema.name.removeprefix("aten::")
    if name in _UNDEFINED and isinstance(result, Tensor):
        result.fill_(0.5 if result.is_floating_point() else 0)
    return result


def _in_any_precision(func: Any) -> Any:
    """Return an operator, or one that does the same where its kernel lacks float64."""
    return _grouped_mm if func._schema.name == "aten::_grouped_mm" else func


def _grouped_mm(
    x: Tensor, weights: Tensor, ends: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    ends = named.pop("offs", ends)
    if x.dtype != torch.float64 or ends is None or (x.dim(), weights.dim()) != (2, 3):
        return torch._grouped_mm(x, weights, ends, *rest, **named)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    rows = x[: sum(sizes)].split(sizes)
    found = torch.cat([one @ matrix for one, matrix in zip(rows, weights, strict=True)])
    return F.pad(found, (0, 0, 0, len(x) - len(found)))


class Promote(TorchDispatchMode):
    """Keeps the whole computation at one precision: casts to a lower one become casts to this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = self.promoted(args, kwargs or {})
        return _defined(func, _in_any_precision(func)(*args, **kwargs))

    def enter(self, node: str) -> None:
        """Start a node."""

    def taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without a rule as the parts that PyTorch makes of it; NotImplemented for any other."""
        if find_rule(func) is not None:
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def promoted(self, args: Any, kwargs: Any) -> Any:
        """Replace lower floating types among the arguments."""
        low = (torch.float16, torch.bfloat16, torch.float32)
        return tree_map(
            lambda v: self.dtype if isinstance(v, torch.dtype) and v in low else v, (args, kwargs)
        )


class MaskMode(Promote):
    """Runs the original program with removed channels zero at their consumers.

    Operators are told apart as `graphprune.labels.propagate` does: by node, name, and occurrence.
    """

    def __init__(self, dtype: torch.dtype, reference: Masked) -> None:
        super().__init__(dtype)
        self.atoms = reference.atoms
        self.node = ""
        self.seen: Counter[str] = Counter()
        self.means = reference.groups.labels.means
        self.consumers: dict[tuple[str, str, int], list[Consumer]] = {}
        for one in reference.groups.labels.consumers:
            if not self.atoms[one.field.atoms].all():
                self.consumers.setdefault((one.node, one.operator, one.occurrence), []).append(one)

    def enter(self, node: str) -> None:
        """Start to count the operators of a node."""
        self.node = node
        self.seen.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = self.promoted(args, kwargs or {})
        if (result := self.taken_apart(func, args, kwargs)) is not NotImplemented:
            return result
        name = func._schema.name
        consumers = self.consumers_of(name)
        if not consumers:
            return _defined(func, _in_any_precision(func)(*args, **kwargs))
        if name in _STATISTICS and not (name == "aten::mean" and self.node in self.means):
            return _STATISTICS[name](args, kwargs, self._mask(consumers, args[0]))
        slots = iter(range(1 << 30))

        def masked(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            slot = next(slots)
            here = [c for c in consumers if c.slot == slot]
            return torch.where(self._mask(here, value), value, 0) if here else value

        args, kwargs = tree_map(masked, (args, kwargs))
        return func(*args, **kwargs)

    def consumers_of(self, name: str) -> list[Consumer] | None:
        """Count an operator; return where the removed channels are among its arguments."""
        occurrence = self.seen[name]
        self.seen[name] += 1
        return self.consumers.get((self.node, name, occurrence))

    def _mask(self, consumers: Sequence[Consumer], value: Tensor) -> Tensor:
        """Return what stays of `value`, which several labels may say."""
        masks = [torch.from_numpy(self.atoms[c.field.over(value.dim())]) for c in consumers]
        return functools.reduce(torch.logical_and, masks)


def _get(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any
) -> Any:
    return args[position] if position < len(args) else kwargs.get(name, default)


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    out: Tensor = _native_layer_norm(args, kwargs, mask)[0]
    return out


def _native_layer_norm(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, shape = args[0], args[1]
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((2, "weight"), (3, "bias")))
    dims = list(range(x.dim() - len(shape), x.dim()))
    inside = mask.expand(x.shape).to(x.dtype)
    count = inside.sum(dims, keepdim=True)
    mean = (x * inside).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * inside).sum(dims, keepdim=True) / count
    scale = torch.rsqrt(variance + _get(args, kwargs, 4, "eps", 1e-5))
    out: Tensor = (x - mean) * scale
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, scale


def _rms_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x, shape, weight = args[0], args[1], _get(args, kwargs, 2, "weight", None)
    eps = _get(args, kwargs, 3, "eps", None)
    dims = list(range(x.dim() - len(shape), x.dim()))
    inside = mask.expand(x.shape).to(x.dtype)
    square = (x.square() * inside).sum(dims, keepdim=True) / inside.sum(dims, keepdim=True)
    out: Tensor = x * torch.rsqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps))
    return out if weight is None else out * weight


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x = args[0]
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((1, "weight"), (2, "bias")))
    dims = [d for d in range(x.dim()) if d != 1]
    inside = mask.expand(x.shape).to(x.dtype)
    count = inside.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * inside).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * inside).sum(dims, keepdim=True) / count
    out: Tensor = (x - mean) * torch.rsqrt(variance + _get(args, kwargs, 7, "eps", 1e-5))
    along = (1, -1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(along)
    return out if bias is None else out + bias.reshape(along)


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    weight, bias = (_get(args, kwargs, i, n, None) for i, n in ((2, "weight"), (3, "bias")))
    eps = _get(args, kwargs, 4, "eps", 1e-5)
    return _normalized_groups(args[0], weight, bias, args[1], eps, mask)[0]


def _native_group_norm(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, _, _, _, groups, eps = args
    return _normalized_groups(x, weight, bias, groups, eps, mask)


def _normalized_groups(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group norm whose statistics are over `mask`, and its means and scales, shape (samples, groups)."""
    split = (x.shape[0], groups, -1, *x.shape[2:])
    dims = list(range(2, x.dim() + 1))
    inside = mask.expand(x.shape).to(x.dtype).reshape(split)
    parts = x.reshape(split)
    count = inside.sum(dims, keepdim=True)
    mean = (parts * inside).sum(dims, keepdim=True) / count
    variance = ((parts - mean).square() * inside).sum(dims, keepdim=True) / count
    scale = torch.rsqrt(variance + eps)
    out = ((parts - mean) * scale).reshape(x.shape)
    along = (1, -1, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(along)
    out = out if bias is None else out + bias.reshape(along)
    return out, mean.reshape(split[:2]), scale.reshape(split[:2])


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor) -> Tensor:
    x = args[0]
    dims = _get(args, kwargs, 1, "dim", None) or list(range(x.dim()))
    keepdim = bool(_get(args, kwargs, 2, "keepdim", False))
    inside = mask.expand(x.shape).to(x.dtype)
    # Of a head that is gone nothing is left to count.
    count = inside.sum(dims, keepdim=keepdim).clamp(min=1)
    mean: Tensor = (x * inside).sum(dims, keepdim=keepdim) / count
    return mean


_STATISTICS = {
    "aten::batch_norm": _batch_norm,
    "aten::mean": _mean,
    "aten::layer_norm": _layer_norm,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::rms_norm": _rms_norm,
    "aten::group_norm": _group_norm,
    "aten::native_group_norm": _native_group_norm,
}
"""Operators that take statistics over channels, with the statistics over the kept channels alone."""
