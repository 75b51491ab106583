"""Distances in a contiguous tensor, and the steps along its dimensions that they stand for.

``as_strided`` speaks of distances; labels and the cut speak of dimensions. A distance of 130 in a tensor of 8 x 4 x 16
is two steps down, none across, and two along: ``(2, 0, 2)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["distance_of", "steps_of"]


def steps_of(distance: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps along each dimension that a distance is, as few as there can be along the inner ones."""
    steps = []
    for dim in range(len(shape)):
        count, distance = divmod(distance, math.prod(shape[dim + 1 :]))
        steps.append(count)
    return tuple(steps)


def distance_of(steps: Sequence[int], shape: Sequence[int]) -> int:
    """Return the distance that steps along the dimensions of a contiguous tensor come to."""
    return sum(count * math.prod(shape[dim + 1 :]) for dim, count in enumerate(steps))
