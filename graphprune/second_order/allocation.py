"""Allocation: how many units of each group go, from tables of error and of cost, by dynamic programming.

    minimise  sum_g error_g(n_g)   subject to   cost(n_1, n_2, ...) <= limit

Errors are taken to add up. Costs do not: what a layer saves depends on what its neighbours have left. So the cost is
made additive around the present choice, a knapsack over a grid of savings is solved exactly, and both steps repeat
until the choice stays. Every choice that is returned has been checked against the exact cost model.

Source: dynamic programming over discrete levels as in Frantar and Alistarh 2022, "SPDY", section 3.2; the repeated
linearisation is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Levels", "allocate"]

BINS = 4000
"""Steps of the grid of savings."""
ROUNDS = 12
"""How often the cost is linearised at most."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What one group may lose."""

    removed: NDArray[np.int64]
    """How many units go, ascending, 0 first; shape [levels]."""
    errors: NDArray[np.float64]
    """Error at each level, not decreasing; shape [levels]."""


def allocate(
    groups: Sequence[Levels], room: Callable[[Sequence[int]], float]
) -> tuple[int, ...] | None:
    """Return the level of each group, or None where even the last levels do not meet the limits.

    Args:
        groups: Their levels.
        room: Level of each group -> how far below the limits the cost is, as a fraction of the dense program; negative
            where a limit is broken. Exact.
    """
    last = tuple(len(g.removed) - 1 for g in groups)
    if room(last) < 0:
        return None
    current: tuple[int, ...] = tuple(0 for _ in groups)
    best, best_error = last, _error(groups, last)
    seen: set[tuple[int, ...]] = set()
    extra = 0.0
    for _ in range(ROUNDS):
        if current in seen:
            extra += 0.002
        seen.add(current)
        savings = [_savings(current, i, len(g.removed), room) for i, g in enumerate(groups)]
        found = _knapsack(groups, savings, needed=extra - room(current))
        if found is None:
            found = last
        left = room(found)
        if left >= 0 and (error := _error(groups, found)) < best_error:
            best, best_error = found, error
        if left >= 0 and found == current:
            break
        extra = max(0.0, extra - left) if left < 0 else extra
        current = found
    return _refilled(groups, best, room)


def _error(groups: Sequence[Levels], levels: Sequence[int]) -> float:
    return float(sum(g.errors[i] for g, i in zip(groups, levels, strict=True)))


def _savings(
    current: Sequence[int], position: int, count: int, room: Callable[[Sequence[int]], float]
) -> NDArray[np.float64]:
    """Return what each level of one group saves against its present one, all other groups as they are."""
    here = room(current)
    trial = list(current)
    result = np.empty(count)
    for level in range(count):
        trial[position] = level
        result[level] = room(trial) - here
    return result


def _knapsack(
    groups: Sequence[Levels], savings: Sequence[NDArray[np.float64]], *, needed: float
) -> tuple[int, ...] | None:
    """Return the levels with the least error whose savings add up to what is needed; None where none do."""
    floors = [s - s.min() for s in savings]
    needed -= float(sum(s.min() for s in savings))
    total = float(sum(f.max() for f in floors))
    if needed > total:
        return None
    if needed <= 0:
        return tuple(0 for _ in groups)
    unit = needed / BINS
    # Savings are rounded down, so that what adds up on the grid adds up in truth.
    steps = [np.minimum(np.floor(f / unit + 1e-9).astype(np.int64), BINS) for f in floors]
    tables = [np.full(BINS + 1, np.inf)]
    tables[0][0] = 0.0
    choices: list[NDArray[np.int64]] = []
    for group, saved in zip(groups, steps, strict=True):
        before, after = tables[-1], np.full(BINS + 1, np.inf)
        choice = np.zeros(BINS + 1, np.int64)
        for level, step in enumerate(saved.tolist()):
            reached = np.full(BINS + 1, np.inf)
            reached[step:] = before[: BINS + 1 - step]
            reached[BINS] = before[BINS - step :].min()  # what is beyond the end is at the end
            reached += group.errors[level]
            better = reached < after
            after[better], choice[better] = reached[better], level
        tables.append(after)
        choices.append(choice)
    if not np.isfinite(tables[-1][BINS]):
        return None
    at, levels = BINS, []
    for before, choice, saved in zip(tables[-2::-1], choices[::-1], steps[::-1], strict=True):
        level = int(choice[at])
        levels.append(level)
        step = int(saved[level])
        at = at - step if at < BINS else BINS - step + int(before[BINS - step :].argmin())
    return tuple(reversed(levels))


def _refilled(
    groups: Sequence[Levels], levels: Sequence[int], room: Callable[[Sequence[int]], float]
) -> tuple[int, ...]:
    """Give back what the limits leave room for, the most error for what it costs first."""
    current = list(levels)
    while True:
        left = room(current)
        best, gain = None, 0.0
        for index, group in enumerate(groups):
            if current[index] == 0:
                continue
            trial = list(current)
            trial[index] -= 1
            after = room(trial)
            if after < 0:
                continue
            relief = float(group.errors[current[index]] - group.errors[current[index] - 1])
            rate = relief / max(left - after, 1e-12)
            if best is None or rate > gain:
                best, gain = index, rate
        if best is None:
            return tuple(current)
        current[best] -= 1
