"""Label fields: which atom every element of a tensor belongs to.

A field names the dimensions along which atoms differ and holds them compactly, one axis per such dimension; along all
other dimensions the label is constant, so the label of a large activation costs as much as its channel count. The
order of the dimensions is the *nesting* order: when channels go, a tensor that is labelled over ``(heads, head_dim)``
is packed row by row, and every row that is left must keep the same count.

Sizes of one are never labelled: nothing can be removed from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.labels.atoms import Atoms, AtomTable

__all__ = [
    "Field",
    "Fields",
    "coarsen",
    "crossed",
    "fix",
    "kept_extent",
    "meet",
    "repeated",
    "settle",
    "tidied",
]


@dataclass(frozen=True)
class Field:
    """Atoms over some dimensions of a tensor."""

    dims: tuple[int, ...]
    """The labelled dimensions in nesting order, outermost first."""
    atoms: Atoms
    """One axis per entry of `dims`."""

    def moved(self, position: Sequence[int]) -> Field:
        """Return the field of a tensor whose dimension `d` has become `position[d]`."""
        return Field(tuple(position[d] for d in self.dims), self.atoms)

    def over(self, rank: int) -> Atoms:
        """Return the atoms with one axis per tensor dimension (size 1 where the label is constant)."""
        order = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        shape = [1] * rank
        for axis, dim in enumerate(self.dims):
            shape[dim] = self.atoms.shape[axis]
        return self.atoms.transpose(order).reshape(shape)


Fields = tuple[Field, ...]


def coarsen(table: AtomTable, field: Field, dims: Iterable[int]) -> Field:
    """Return `field` seen along `dims` only.

    The result holds atoms that are present while anything of their block is. Where `dims` are not the outer dimensions,
    all that is left of the others must keep the same indices along them.
    """
    wanted = set(dims)
    keep = [axis for axis, dim in enumerate(field.dims) if dim in wanted]
    if len(keep) == len(field.dims):
        return field
    if keep == list(range(len(keep))):
        shape = field.atoms.shape[: len(keep)]
        return Field(field.dims[: len(keep)], table.block(field.atoms.reshape(*shape, -1)))
    others = [axis for axis in range(len(field.dims)) if axis not in keep]
    shape = tuple(field.atoms.shape[axis] for axis in keep)
    outer = others[0]  # what lies before all others is a block, and its inside a grid of its own
    rows = field.atoms.transpose([*keep[:outer], *others, *keep[outer:]])
    grids = rows.reshape(math.prod(shape[:outer]), -1, math.prod(shape[outer:]))
    columns = np.stack([table.grid(np.ascontiguousarray(grid)) for grid in grids])
    return Field(tuple(field.dims[axis] for axis in keep), columns.reshape(shape))


def tidied(table: AtomTable, fields: Sequence[Field]) -> Fields:
    """Return `fields` without those that say no more than another: blocks alone, where another has their members."""
    result = []
    for field in fields:
        wider = next((f for f in fields if set(field.dims) < set(f.dims)), None)
        if wider is None:
            result.append(field)
        else:
            coarse = coarsen(table, wider, field.dims)
            table.unify(coarse.atoms, _aligned(field, coarse.dims))
    return tuple(result)


def fix(table: AtomTable, field: Field, dim: int, why: str, node: str) -> None:
    """Forbid every removal that would change the tensor's size along `dim`."""
    axis = field.dims.index(dim)
    if len(field.dims) == 1:
        table.pin(field.atoms, why, node)
    elif axis == len(field.dims) - 1:
        table.unify_along(field.atoms, axis)
    else:
        table.pin(coarsen(table, field, field.dims[: axis + 1]).atoms, why, node)


def settle(
    table: AtomTable, field: Field, dims: Iterable[int], why: str, node: str
) -> Field | None:
    """Forbid removals that change the sizes along `dims`, and return the label over the other dimensions, if any."""
    for dim in dims:
        if len(field.dims) == 1:
            table.pin(field.atoms, why, node)
            return None
        axis = field.dims.index(dim)
        names = field.dims[:axis] + field.dims[axis + 1 :]
        field = Field(names, table.unify_along(field.atoms, axis))
    return field


def crossed(table: AtomTable, a: Field, b: Field) -> Field | None:
    """Return the label of what is told apart by two labels at once, which goes with either; None where they overlap.

    The two may lie in the same blocks: share their outer dimensions.
    """
    shared = [d for d, e in zip(a.dims, b.dims, strict=False) if d == e]
    count = len(shared)
    rest, last = a.dims[count:], b.dims[count:]
    if set(rest) & set(last) or not rest or not last or a.dims[:count] != b.dims[:count]:
        return None
    if rest > last:
        a, b, rest, last = b, a, last, rest
    shape = a.atoms.shape + b.atoms.shape[count:]
    atoms = table.fresh(math.prod(shape)).reshape(shape)
    outer = a.atoms.shape[:count]
    blocks = atoms.reshape(*outer, math.prod(a.atoms.shape[count:]), -1)
    for index in np.ndindex(outer):
        rows = table.block(blocks[index], is_head=False)
        table.unify(rows, a.atoms[index].ravel())
        table.unify(table.grid(blocks[index]), b.atoms[index].ravel())
    return Field((*a.dims, *last), atoms)


def repeated(table: AtomTable, heads: Atoms, copies: Atoms | int, node: str) -> Atoms:
    """Return the atoms of heads that are repeated, each for several query heads.

    A copy may go alone, with the query head that it meets, while as many are left of every head; dimensions go from a
    head and all its copies.

    Args:
        table: Where the facts go.
        heads: Shape (heads, ...), the dimensions of a head behind it.
        copies: Atoms of a dimension that held the copies before, or how many there are.
        node: The graph node at work.

    Returns:
        Shape (heads, copies, ...).
    """
    count, *inner = heads.shape
    number = copies if isinstance(copies, int) else len(copies)
    atoms = table.fresh(count * number * math.prod(inner)).reshape(count, number, *inner)
    for head, own in zip(heads.reshape(count, -1), atoms.reshape(count, number, -1), strict=True):
        table.unify(table.grid(own), head)
    table.block(heads.reshape(count, -1))
    rows = table.block(atoms.reshape(count, number, -1))
    table.nest(rows, node)
    if not isinstance(copies, int):
        table.repeat(copies, rows, node)
    return atoms


def meet(
    table: AtomTable, operands: Sequence[tuple[Fields, frozenset[int]]], why: str, node: str
) -> Fields:
    """Bring the labels of tensors together that share an index space, as an elementwise operation does.

    Args:
        table: Where the facts go.
        operands: For each tensor its fields, and the dimensions along which it has more than one element; both in the
            numbering of the shared space.
        why: What to say of atoms that meet a dimension which cannot change.
        node: The graph node at work.

    Returns:
        The fields of the result.
    """
    merged: list[Field] = []
    for fields, _ in operands:
        for field in fields:
            _merge(table, merged, field, node)
    for fields, extent in operands:
        labelled = {dim for field in fields for dim in field.dims}
        for field in merged:
            for dim in field.dims:
                if dim in extent and dim not in labelled:
                    fix(table, field, dim, why, node)
    return tuple(merged)


def _merge(table: AtomTable, merged: list[Field], field: Field, node: str) -> None:
    """Add `field` to `merged`, unified with the fields that it shares dimensions with."""
    for other in list(merged):
        shared = set(other.dims) & set(field.dims)
        if not shared:
            continue
        if other.dims == field.dims:
            table.unify(other.atoms, field.atoms)
            return
        if shared == set(other.dims) == set(field.dims):
            table.unify(_packed(table, other, node), _aligned(field, other.dims))
            return
        if shared == set(field.dims):
            coarse = coarsen(table, other, field.dims)
            table.unify(coarse.atoms, _aligned(field, coarse.dims))
            return
        if shared == set(other.dims):
            coarse = coarsen(table, field, other.dims)
            table.unify(_aligned(other, coarse.dims), coarse.atoms)
            merged[:] = [f for f in merged if f is not other]
        elif set(other.dims[: len(shared)]) == set(field.dims[: len(shared)]) == shared:
            # Both lie in blocks over the same outer dimensions (heads): the blocks are the same.
            outer = coarsen(table, other, shared)
            coarse = coarsen(table, field, shared)
            table.unify(outer.atoms, _aligned(coarse, outer.dims))
        else:
            table.pin(other.atoms, "two labels share only a part of their dimensions", node)
            table.pin(field.atoms, "two labels share only a part of their dimensions", node)
            return
    merged.append(field)


def _aligned(field: Field, dims: tuple[int, ...]) -> Atoms:
    return field.atoms.transpose([field.dims.index(d) for d in dims])


def _packed(table: AtomTable, field: Field, node: str) -> Atoms:
    """Demand the same indices in every block, so that the nesting order does not matter."""
    for axis in range(len(field.dims) - 1):
        table.unify_along(field.atoms, axis)
    return field.atoms


def kept_extent(field: Field, dim: int, keep: NDArray[np.bool_]) -> int:
    """Return the size along `dim` that is left when only the atoms in `keep` are."""
    axis = field.dims.index(dim)
    kept: NDArray[np.bool_] = keep[field.atoms]
    inner = tuple(range(axis + 1, kept.ndim))
    if inner:
        kept = np.asarray(kept.any(axis=inner))
    return int(kept.sum(axis=axis).max())
