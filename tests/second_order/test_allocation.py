"""Allocation: the knapsack is as good as its grid where costs add up, and respects the limit where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.second_order.allocation import BINS, Levels, allocate


def _levels(errors: Sequence[float]) -> Levels:
    return Levels(removed=np.arange(len(errors)), errors=np.maximum.accumulate(np.array(errors)))


def choices_of(groups: Sequence[Levels]) -> Iterator[tuple[int, ...]]:
    """Yield every choice of one level for each group."""
    return itertools.product(*(range(len(g.removed)) for g in groups))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_additive_costs_are_solved_to_a_bin_for_each_group(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    numbers = st.integers(0, 40)
    groups, savings = [], []
    for _ in range(count):
        size = data.draw(st.integers(2, 5))
        steps = data.draw(st.lists(numbers, min_size=size - 1, max_size=size - 1))
        groups.append(_levels([0.0, *np.cumsum(steps)]))
        saved = data.draw(st.lists(st.integers(1, 20), min_size=size - 1, max_size=size - 1))
        savings.append(np.concatenate([[0], np.cumsum(saved)]) / 100)
    needed = data.draw(st.integers(1, 100)) / 100

    def room(chosen: Sequence[int]) -> float:
        return float(sum(s[i] for s, i in zip(savings, chosen, strict=True))) - needed + 1e-9

    fitting = [c for c in choices_of(groups) if room(c) >= 0]
    found = allocate(groups, room)
    if not fitting:
        assert found is None
        return

    def error(chosen: Sequence[int]) -> float:
        return float(sum(g.errors[i] for g, i in zip(groups, chosen, strict=True)))

    assert found is not None
    assert room(found) >= 0
    assert error(found) >= min(map(error, fitting)) - 1e-9
    # Savings are rounded down to bins, group by group; what fits with that much to spare is found.
    if roomy := [c for c in choices_of(groups) if room(c) >= count * needed / BINS]:
        assert error(found) <= min(map(error, roomy)) + 1e-9


def test_products_of_widths_meet_the_limit_closely() -> None:
    """A chain of layers, where what one saves depends on what its neighbour has left."""
    width, count = 32, 6
    sensitivity = np.array([1.0, 8.0, 1.0, 3.0, 0.5, 2.0])
    groups = [_levels(list(s * (np.arange(width) / width) ** 2)) for s in sensitivity]

    def room(chosen: Sequence[int]) -> float:
        left = [1.0, *(1 - i / width for i in chosen), 1.0]
        return 0.5 - float(np.mean([a * b for a, b in itertools.pairwise(left)]))

    found = allocate(groups, room)
    assert found is not None
    assert 0 <= room(found) < 0.01
    uniform = next(i for i in range(width) if room([i] * count) >= 0)
    errors = [
        sum(g.errors[i] for g, i in zip(groups, c, strict=True)) for c in (found, [uniform] * count)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert found[1] < found[4]


def test_what_cannot_be_reached_is_none() -> None:
    groups = [_levels([0.0, 1.0, 2.0])]
    assert allocate(groups, lambda chosen: chosen[0] - 3.0) is None


def test_nothing_goes_where_the_limit_is_met() -> None:
    groups = [_levels([0.0, 1.0, 2.0]), _levels([0.0, 0.0])]
    assert allocate(groups, lambda chosen: 0.1) == (0, 0)
