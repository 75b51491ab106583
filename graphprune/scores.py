"""Scores: how important each coupled channel is, summed over all the places where it lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.groups import DependencyGroups, Place
from graphprune.pipeline import Facts
from graphprune.program import Program

__all__ = ["Scores", "along", "last_where_unseen", "norms_along", "sum_over_places"]


@dataclass(frozen=True, kw_only=True)
class Scores(Facts):
    """Importance of every coupled channel; low goes first."""

    values: NDArray[np.float64] = field(repr=False)
    """Shape (num_channels,)."""
    method: str
    """Name of the pass that scored."""


def along(tensor: Tensor, dim: int) -> NDArray[np.float64]:
    """Return `tensor` summed over all dimensions but `dim`, in float64."""
    others = [d for d in range(tensor.dim()) if d != dim]
    summed = tensor.sum(others) if others else tensor
    result: NDArray[np.float64] = summed.detach().double().cpu().numpy()
    return result


def norms_along(tensor: Tensor, dim: int, *, order: int) -> NDArray[np.float64]:
    """Return the sum of ``|w| ** order`` over all dimensions but `dim`, for `order` 1 or 2.

    Written so that no temporary is as large as the tensor, and memory is read once, in order.
    """
    data = tensor.detach()
    if dim == 0:
        norms = torch.linalg.vector_norm(data, order, dim=list(range(1, data.dim())))
        return along(norms.double() ** order, 0)
    if dim > 1:
        return along(data.abs() ** order, dim)
    flat = data.flatten(1)
    rows = max(1, _CHUNK // max(1, flat.shape[1]))
    sums = [(part.square() if order == 2 else part.abs()).sum(0) for part in flat.split(rows)]
    return along(torch.stack(sums).double().sum(0).view(data.shape[1], -1), 0)


_CHUNK = 1 << 18
"""Elements that are squared at a time: what stays in a core's cache."""


def sum_over_places(
    program: Program,
    groups: DependencyGroups,
    measure: Callable[[Place, Tensor], NDArray[np.float64] | None],
) -> NDArray[np.float64]:
    """Return, for every coupled channel, the sum of `measure` over the places where it lives.

    Args:
        program: The analysed program.
        groups: Its analysis.
        measure: Returns one number per index along the place's dimension, or None to pass over the place.
    """
    tensors = dict(program.named_tensors())
    values = np.zeros(groups.num_channels)
    for place in groups.places:
        if place.name in tensors and (part := measure(place, tensors[place.name])) is not None:
            np.add.at(values, groups.channels_of(place), part)
    return values


def last_where_unseen(
    program: Program,
    groups: DependencyGroups,
    measure: Callable[[Place, Tensor], NDArray[np.float64] | None],
) -> NDArray[np.float64]:
    """Return `sum_over_places`, and for channels that `measure` saw nowhere a value far above all others.

    It is finite, and means that the budget takes these channels last.
    """

    def seen(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
        found = measure(place, tensor)
        return None if found is None else np.ones(len(found))

    values = sum_over_places(program, groups, measure)
    counts = sum_over_places(program, groups, seen)
    values[counts == 0] = 1e6 * max(1.0, float(values.max(initial=0.0)))
    return values
