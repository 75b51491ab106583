"""Fields: how labels are seen along some dimensions, fixed, settled, and brought together."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.labels.atoms import AtomTable
from graphprune.labels.field import Field, Fields, coarsen, fix, kept_extent, meet, settle


@pytest.fixture
def table() -> AtomTable:
    return AtomTable()


def joint(
    table: AtomTable, dims: tuple[int, ...] = (1, 2), shape: tuple[int, ...] = (2, 3)
) -> Field:
    return Field(dims, table.fresh(int(np.prod(shape))).reshape(shape))


def pairs(table: AtomTable) -> list[tuple[int, int]]:
    """Return the pairs that say something, sorted."""
    found = {
        (min(a, b), max(a, b))
        for left, right in table.pairs
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
        if a != b
    }
    return sorted(found)


def pinned(table: AtomTable) -> list[int]:
    return sorted(a for pin in table.pins for a in pin.atoms.tolist())


class TestField:
    def test_moved_renames_dimensions(self, table: AtomTable) -> None:
        field = joint(table, (0, 2)).moved([2, 0, 1])
        assert field.dims == (2, 1)

    def test_over_lays_atoms_along_the_dimensions_of_a_tensor(self, table: AtomTable) -> None:
        field = Field((3, 1), table.fresh(6).reshape(2, 3))
        over = field.over(4)
        assert over.shape == (1, 3, 1, 2)
        assert over[0, 1, 0, 1] == field.atoms[1, 1]


class TestCoarsen:
    def test_all_dimensions_change_nothing(self, table: AtomTable) -> None:
        field = joint(table)
        assert coarsen(table, field, (2, 1)) is field

    def test_outer_dimensions_become_blocks(self, table: AtomTable) -> None:
        field = joint(table)
        outer = coarsen(table, field, (1,))
        assert outer.dims == (1,)
        assert outer.atoms.tolist() == [6, 7]
        assert table.blocks[0].members.tolist() == field.atoms.tolist()
        assert pairs(table) == []

    def test_inner_dimensions_are_columns_that_all_blocks_keep(self, table: AtomTable) -> None:
        inner = coarsen(table, joint(table), (2,))
        assert (inner.dims, inner.atoms.tolist()) == ((2,), [6, 7, 8])
        assert pairs(table) == []
        assert [(g.atoms.tolist(), g.columns.tolist()) for g in table.grids] == [
            ([[0, 1, 2], [3, 4, 5]], [6, 7, 8])
        ]
        assert table.blocks[0].members.tolist() == [[0, 3], [1, 4], [2, 5]]
        assert not table.blocks[0].is_head


class TestFix:
    def test_only_dimension_is_pinned(self, table: AtomTable) -> None:
        fix(table, Field((1,), table.fresh(3)), 1, "why", "node")
        assert pinned(table) == [0, 1, 2]
        assert table.pins[0].why == "why"

    def test_inner_dimension_becomes_one_channel_per_block(self, table: AtomTable) -> None:
        fix(table, joint(table), 2, "why", "node")
        assert pinned(table) == []
        assert pairs(table) == [(0, 1), (0, 2), (3, 4), (3, 5)]

    def test_outer_dimension_pins_the_blocks_but_not_their_members(self, table: AtomTable) -> None:
        fix(table, joint(table), 1, "why", "node")
        assert pinned(table) == [6, 7]
        assert table.blocks[0].members.tolist() == [[0, 1, 2], [3, 4, 5]]


class TestSettle:
    def test_all_dimensions_pin(self, table: AtomTable) -> None:
        assert settle(table, joint(table), (1, 2), "why", "node") is None
        assert pairs(table) == [(0, 3), (1, 4), (2, 5)]
        assert pinned(table) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("dim", "dims", "atoms", "unified"),
        [
            (1, (2,), [0, 1, 2], [(0, 3), (1, 4), (2, 5)]),
            (2, (1,), [0, 3], [(0, 1), (0, 2), (3, 4), (3, 5)]),
        ],
    )
    def test_other_dimension_is_left(
        self,
        table: AtomTable,
        dim: int,
        dims: tuple[int, ...],
        atoms: list[int],
        unified: list[tuple[int, int]],
    ) -> None:
        left = settle(table, joint(table), (dim,), "why", "node")
        assert left is not None
        assert (left.dims, left.atoms.tolist()) == (dims, atoms)
        assert pairs(table) == unified
        assert pinned(table) == []


class TestMeet:
    def meet(self, table: AtomTable, *operands: tuple[Fields, set[int]]) -> Fields:
        return meet(table, [(f, frozenset(e)) for f, e in operands], "fixed", "add")

    def test_equal_dimensions_are_unified(self, table: AtomTable) -> None:
        a, b = Field((1,), table.fresh(3)), Field((1,), table.fresh(3))
        assert self.meet(table, ((a,), {0, 1}), ((b,), {0, 1})) == (a,)
        assert pairs(table) == [(0, 3), (1, 4), (2, 5)]
        assert pinned(table) == []

    def test_other_dimensions_stand_side_by_side(self, table: AtomTable) -> None:
        a, b = Field((1,), table.fresh(3)), Field((2,), table.fresh(2))
        assert self.meet(table, ((a,), {1}), ((b,), {2})) == (a, b)
        assert pairs(table) == []
        assert pinned(table) == []

    def test_unlabelled_dimension_pins_what_meets_it(self, table: AtomTable) -> None:
        a = Field((1,), table.fresh(3))
        assert self.meet(table, ((a,), {0, 1}), ((), {0, 1})) == (a,)
        assert pinned(table) == [0, 1, 2]
        assert (table.pins[0].why, table.pins[0].node) == ("fixed", "add")

    def test_broadcast_dimension_pins_nothing(self, table: AtomTable) -> None:
        a = Field((1,), table.fresh(3))
        assert self.meet(table, ((a,), {0, 1}), ((), {0})) == (a,)
        assert pinned(table) == []

    def test_joint_label_meets_blocks(self, table: AtomTable) -> None:
        wide, narrow = joint(table), Field((1,), table.fresh(2))
        assert self.meet(table, ((narrow,), {1}), ((wide,), {1, 2})) == (wide,)
        assert pairs(table) == [(6, 8), (7, 9)]
        assert table.blocks[0].rows.tolist() == [8, 9]

    def test_joint_label_meets_what_is_inside_its_blocks(self, table: AtomTable) -> None:
        wide, narrow = joint(table), Field((2,), table.fresh(3))
        assert self.meet(table, ((wide,), {1, 2}), ((narrow,), {2})) == (wide,)
        assert pairs(table) == [(6, 9), (7, 10), (8, 11)]
        assert table.grids[0].columns.tolist() == [9, 10, 11]

    def test_other_nesting_order_demands_equal_indices(self, table: AtomTable) -> None:
        a = joint(table, (1, 2), (2, 2))
        b = Field((2, 1), table.fresh(4).reshape(2, 2))
        assert self.meet(table, ((a,), {1, 2}), ((b,), {1, 2})) == (a,)
        assert (0, 4) in pairs(table)
        assert (1, 6) in pairs(table)
        assert (2, 5) in pairs(table)
        assert (0, 2) in pairs(table)

    def test_labels_that_cross_are_pinned(self, table: AtomTable) -> None:
        a = joint(table, (1, 2), (2, 2))
        b = joint(table, (2, 3), (2, 2))
        self.meet(table, ((a,), {1, 2}), ((b,), {2, 3}))
        assert pinned(table) == list(range(8))
        assert table.pins[0].why == "two labels share only a part of their dimensions"


@pytest.mark.parametrize(
    ("removed", "dim", "extent"),
    [
        ([], 1, 2),
        ([], 2, 3),
        ([0, 3], 2, 2),
        ([0, 3], 1, 2),
        ([3, 4, 5], 1, 1),
        ([3, 4, 5], 2, 3),
        ([1, 2, 3, 4, 5], 2, 1),
    ],
)
def test_kept_extent(table: AtomTable, removed: list[int], dim: int, extent: int) -> None:
    field = joint(table)
    keep = np.ones(6, np.bool_)
    keep[removed] = False
    assert kept_extent(field, dim, keep) == extent
