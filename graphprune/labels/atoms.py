"""Atoms, and what is known about which of them must go together.

An *atom* is an integer that stands for one index along one dimension of a parameter, a buffer, or a tensor that the
graph fills with a constant. While labels travel through the graph, rules note facts about atoms in an `AtomTable`:

- `unify`   two atoms are the same channel;
- `pin`     an atom may never be removed, and why;
- `block`   a new atom that is present exactly as long as any of its members is (a head, a convolution group);
- `nest`    an array of atoms that a tensor holds over several dimensions: all rows that are left keep equal counts;
- `grid`    an array of atoms whose rows meet something that all share (one rotation for all heads): all rows that
  are left keep the same columns.

Nothing is resolved here; `graphprune.groups` turns the table into coupled channels.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

__all__ = ["AtomTable", "Atoms", "Block", "Grid", "Nest", "Pin"]

Atoms = NDArray[np.int64]


@dataclass(frozen=True)
class Pin:
    """Atoms that may never be removed, with the reason and the node that asked for it."""

    atoms: Atoms
    why: str
    node: str


@dataclass(frozen=True)
class Block:
    """Atoms `rows[i]`, each present as long as any atom of `members[i]` is."""

    rows: Atoms
    """Shape (n,)."""
    members: Atoms
    """Shape (n, m)."""
    is_head: bool
    """Whether the block is an attention head (or what acts like one) rather than a convolution group."""


@dataclass(frozen=True)
class Nest:
    """An array of atoms whose rows (last axis) must keep equal counts, unless a row goes as a whole."""

    atoms: Atoms
    """Shape (..., m), outermost dimension first."""
    node: str


@dataclass(frozen=True)
class Grid:
    """An array of atoms whose rows must keep the same columns, unless a row goes as a whole."""

    atoms: Atoms
    """Shape (rows, columns)."""
    columns: Atoms
    """Shape (columns,): an atom for each column, present as long as anything of it is."""


@dataclass
class AtomTable:
    """Everything that propagation learns about atoms."""

    size: int = 0
    pairs: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    nests: list[Nest] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    products: list[Atoms] = field(default_factory=list)
    """Atoms over several dimensions, one of which a contraction sums over: queries and keys of heads meet along it."""
    repeats: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    """Places of copies and what was laid out in them; see `repeat`."""
    _block_of: dict[tuple[bytes, tuple[int, ...]], Atoms] = field(default_factory=dict)
    _axes: list[tuple[int, int, int]] = field(default_factory=list)
    _copies: list[tuple[int, int]] = field(default_factory=list)
    _nested: set[tuple[bytes, tuple[int, ...]]] = field(default_factory=set)
    _gridded: dict[tuple[bytes, tuple[int, ...]], Atoms] = field(default_factory=dict)

    def fresh(self, count: int) -> Atoms:
        """Return `count` atoms that stand for nothing yet."""
        atoms = np.arange(self.size, self.size + count)
        self.size += count
        return atoms

    def axis(self, count: int, tensor: int) -> Atoms:
        """Return fresh atoms for a dimension of the parameter, buffer or constant of that number."""
        self._axes.append((self.size, self.size + count, tensor))
        return self.fresh(count)

    def of_one_tensor(self, a: Atoms, b: Atoms) -> bool:
        """Whether both are dimensions of one parameter, buffer or constant, and not the same one."""
        first, second = self._axis_of(int(a.flat[0])), self._axis_of(int(b.flat[0]))
        return (
            first is not None and second is not None and first[2] == second[2] and first != second
        )

    def _axis_of(self, atom: int) -> tuple[int, int, int] | None:
        at = bisect_right(self._axes, atom, key=itemgetter(0)) - 1
        return self._axes[at] if at >= 0 and atom < self._axes[at][1] else None

    def copies(self, count: int) -> Atoms:
        """Return fresh atoms for copies that broadcasting made: they are whatever they meet."""
        atoms = self.fresh(count)
        self._copies.append((self.size - count, self.size))
        return atoms

    def are_copies(self, atoms: Atoms) -> bool:
        """Whether `atoms` are copies that broadcasting made."""
        low, high = (int(atoms.min()), int(atoms.max())) if atoms.size else (0, -1)
        return any(start <= low and high < stop for start, stop in self._copies)

    def unify(self, a: Atoms, b: Atoms) -> None:
        """Note that `a[i]` and `b[i]` are the same channel; shapes must broadcast."""
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        if a is not b:
            self.pairs.append((a.ravel(), b.ravel()))

    def unify_along(self, atoms: Atoms, axis: int) -> Atoms:
        """Note that atoms along `axis` are one channel; return the array without that axis."""
        first: Atoms = np.asarray(atoms.take(0, axis=axis))
        self.unify(np.expand_dims(first, axis), atoms)
        return first

    def pin(self, atoms: Atoms, why: str, node: str) -> None:
        """Note that `atoms` may never be removed."""
        self.pins.append(Pin(atoms.ravel(), why, node))

    def block(self, members: Atoms, *, is_head: bool = True) -> Atoms:
        """Return one atom per row of `members` (shape (..., m)): present as long as any of the row is."""
        key = (members.tobytes(), members.shape)
        if key not in self._block_of:
            flat = members.reshape(-1, members.shape[-1])
            rows = self.fresh(len(flat))
            self.blocks.append(Block(rows, flat, is_head))
            self._block_of[key] = rows.reshape(members.shape[:-1])
        return self._block_of[key]

    def grid(self, atoms: Atoms) -> Atoms:
        """Note that all rows of `atoms`, shape (rows, columns), keep the same columns; return an atom per column.

        A row may go as a whole. An atom of a column is present as long as anything of the column is.
        """
        key = (atoms.tobytes(), atoms.shape)
        if key not in self._gridded:
            columns = self.block(atoms.T, is_head=False)
            self.grids.append(Grid(atoms, columns))
            self._gridded[key] = columns
        return self._gridded[key]

    def repeat(self, places: Atoms, rows: Atoms, node: str) -> None:
        """Note that the copies in `places`, shape (n,), were laid out as `rows`, shape (heads, n).

        As many places are left as every row keeps.
        """
        for others, theirs in self.repeats:
            if others is places:
                self.nest(np.concatenate([theirs, rows]), node)
        self.repeats.append((places, rows))

    def nest(self, atoms: Atoms, node: str) -> None:
        """Note that a tensor holds `atoms` over two or more dimensions, outermost first."""
        key = (atoms.tobytes(), atoms.shape)
        if atoms.ndim > 1 and atoms.shape[-1] > 1 and key not in self._nested:
            self._nested.add(key)
            self.nests.append(Nest(atoms, node))
