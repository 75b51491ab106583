"""Facts about atoms: noted once, in the shape that they were given."""

from __future__ import annotations

import numpy as np

from graphprune.labels.atoms import AtomTable


def test_fresh_atoms_are_numbered_on() -> None:
    table = AtomTable()
    assert table.fresh(3).tolist() == [0, 1, 2]
    assert table.fresh(2).tolist() == [3, 4]
    assert table.size == 5


def test_copies_are_known_as_such() -> None:
    table = AtomTable()
    real, copies, later = table.fresh(3), table.copies(4), table.fresh(2)
    assert table.are_copies(copies)
    assert table.are_copies(copies[1:3])
    assert not table.are_copies(real)
    assert not table.are_copies(later)
    assert not table.are_copies(np.concatenate([real, copies]))
    assert not table.are_copies(np.zeros(0, np.int64))


def test_unify_broadcasts() -> None:
    table = AtomTable()
    a, b = table.fresh(2), table.fresh(4).reshape(2, 2)
    table.unify(a[:, None], b)
    ((left, right),) = table.pairs
    assert left.tolist() == [0, 0, 1, 1]
    assert right.tolist() == [2, 3, 4, 5]


def test_unify_with_itself_says_nothing() -> None:
    table = AtomTable()
    a = table.fresh(2)
    table.unify(a, a)
    assert table.pairs == []


def test_unify_along_takes_one_of_each() -> None:
    table = AtomTable()
    atoms = table.fresh(6).reshape(2, 3)
    assert table.unify_along(atoms, 1).tolist() == [0, 3]
    ((left, right),) = table.pairs
    assert left.tolist() == [0, 0, 0, 3, 3, 3]
    assert right.tolist() == [0, 1, 2, 3, 4, 5]


def test_pin_keeps_reason_and_node() -> None:
    table = AtomTable()
    table.pin(table.fresh(4).reshape(2, 2), "because", "conv")
    (pin,) = table.pins
    assert (pin.atoms.tolist(), pin.why, pin.node) == ([0, 1, 2, 3], "because", "conv")


def test_block_has_an_atom_per_row_and_is_made_once() -> None:
    table = AtomTable()
    members = table.fresh(12).reshape(2, 3, 2)
    rows = table.block(members)
    assert rows.shape == (2, 3)
    assert rows.ravel().tolist() == list(range(12, 18))
    assert table.block(members.copy()) is rows
    (block,) = table.blocks
    assert block.is_head
    assert block.members.tolist() == members.reshape(6, 2).tolist()


def test_blocks_of_other_shape_differ() -> None:
    table = AtomTable()
    members = table.fresh(4)
    assert table.block(members.reshape(2, 2), is_head=False).tolist() == [4, 5]
    assert table.block(members.reshape(1, 4), is_head=False).tolist() == [6]
    assert [b.is_head for b in table.blocks] == [False, False]


def test_nest_is_noted_once_and_only_where_rows_could_differ() -> None:
    table = AtomTable()
    atoms = table.fresh(6)
    table.nest(atoms, "flat")
    table.nest(atoms.reshape(6, 1), "thin")
    assert table.nests == []
    table.nest(atoms.reshape(2, 3), "view")
    table.nest(atoms.reshape(2, 3), "again")
    (nest,) = table.nests
    assert nest.node == "view"
