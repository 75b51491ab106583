"""The promise: every cut is proven exact by running it.

A removal is exact when the smaller program equals the original program in which the removed channels are zero *at their
consumers*: wherever the original sums over a removed channel, it finds a zero there; where it takes statistics over
channels (layer, group, RMS norm), it takes them over the kept ones. Both programs run side by side on random
inputs, node by node, and every tensor of the original, restricted to what is kept, must equal its counterpart.
So a cut that falls short is caught at the first node that differs, even where the outputs hide it.

Other surgeries (clean-up, folding) promise equal outputs; there only the outputs are compared.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from graphprune.check import Check
from graphprune.errors import VerifyError
from graphprune.labels.trace import TensorInfo
from graphprune.program import Program
from graphprune.verify_masked import Masked, MaskMode, Promote, run_under

__all__ = [
    "Differs",
    "Masked",
    "assert_exact",
    "relative",
    "restrict",
    "verify_surgery",
]

SAMPLES = 2
"""How many random samples both programs run on, unless labels were found for another number."""
ROUNDINGS = 64
"""How many roundings of a parameter, by its own precision, may show in a tensor."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference, relative to the largest value of the tensor: sums in another order differ by rounding
alone, which grows with depth; a wrong channel differs by the size of the values themselves."""


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
    before: Program,
    after: Program,
    reference: Masked | Program | None = None,
    *,
    is_rounded: bool = False,
) -> Check:
    """Run the program before and after a surgery on the same random inputs and compare.

    Args:
        before: The program that went in.
        after: The program that came out.
        reference: What went in must be masked like this, or what stands in for it; None: the outputs must simply be
            equal.
        is_rounded: Whether parameters of `after` are rounded results; then the tolerance allows for that.

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
    if is_rounded:
        tolerance = max(tolerance, ROUNDINGS * _precision(after))
    before, after = (_as(p, dtype) for p in (before, after))
    # A label over batch and channels in one dimension (attention written for ``batch * heads``) fits one batch only.
    samples = SAMPLES if reference is None else reference.groups.labels.batch
    inputs = before.batch(samples, seed=1, dtype=dtype)
    if before.dialect == "module":
        inputs = before.example_inputs
    with torch.inference_mode(), _default_dtype(dtype):
        try:
            worst = _compare(before, after, inputs, reference, dtype, tolerance)
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


def _precision(program: Program) -> float:
    """Return the step between numbers next to 1 in the coarsest of a program's floating types."""
    types = {t.dtype for _, t in program.named_tensors() if t.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


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
    dtype: torch.dtype,
    tolerance: float,
) -> float:
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
    cut = run_under(after.module, inputs, Promote(dtype))
    # A cut may write one node as two (a mean as a sum and a division); the last one keeps the name.
    counterparts = ((node, value) for node, value in cut if node.name in names)
    runs = zip(run_under(before.module, inputs, mask), counterparts, strict=True)
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
