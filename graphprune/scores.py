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

__all__ = ["Scores", "along", "norms_along", "sum_over_places"]


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

    Written so that no temporary is as large as the tensor: a norm over trailing dimensions is one pass over memory.
    """
    data = tensor.detach()
    if dim == 0:
        return _power(torch.linalg.vector_norm(data, order, dim=list(range(1, data.dim()))), order)
    if dim == 1 and data.dim() > 2:
        data = torch.linalg.vector_norm(data, order, dim=list(range(2, data.dim())))
    if data.dim() > 2:
        return along(data.abs() ** order, dim)
    rows = max(1, _CHUNK // max(1, data.shape[1]))
    total: NDArray[np.float64] = np.sum(
        [_power(part, order).sum(axis=0) for part in data.split(rows)], axis=0
    )
    return total


_CHUNK = 1 << 18
"""Elements that are squared at a time: what stays in a core's cache."""


def _power(tensor: Tensor, order: int) -> NDArray[np.float64]:
    values: NDArray[np.float64] = (
        (tensor.square() if order == 2 else tensor.abs()).double().cpu().numpy()
    )
    return values


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
