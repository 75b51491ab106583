"""Scores: how important each coupled channel is, summed over all the places where it lives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphprune.contract import Facts
from graphprune.flow import unavoidable_parameters
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program

__all__ = ["Scores", "along", "divisors", "last_where_unseen", "norms_along", "sum_over_places"]


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


def divisors(sums: Mapping[str, float], through: Collection[str]) -> dict[str, float]:
    """Return what to divide the scores of layers by, so that they compare from layer to layer.

    A layer that a shortcut or a branch goes around is compared as it is with others of its kind, over the mean of their
    sums: what training has made small there matters little. A layer that everything goes through matters whatever its
    scale: its own sum makes shares of its scores. Ours, measured in docs/experiments.md, 7 and 9.

    Args:
        sums: The sum of each layer's scores, by a name of the layer.
        through: Names of layers that everything goes through (`graphprune.flow`).
    """
    beside = [total for name, total in sums.items() if name not in through]
    mean = float(np.mean(beside)) if beside else 1.0
    return {n: max(total if n in through else mean, _TINY) for n, total in sums.items()}


_TINY = float(np.finfo(np.float64).tiny)


def sum_over_places(
    program: Program,
    groups: DependencyGroups,
    measure: Callable[[Place, Tensor], NDArray[np.float64] | None],
    *,
    relative: bool = False,
) -> NDArray[np.float64]:
    """Return, for every coupled channel, the sum of `measure` over the places where it lives.

    Args:
        program: The analysed program.
        groups: Its analysis.
        measure: Returns one number per index along the place's dimension, or None to pass over the place.
        relative: Make what `measure` returns comparable from layer to layer first (`divisors`).
    """
    tensors = dict(program.named_tensors())
    values = np.zeros(groups.num_channels)
    parts: dict[Place, NDArray[np.float64]] = {}
    for place in groups.places:
        if place.name in tensors and (part := measure(place, tensors[place.name])) is not None:
            parts[place] = part
    by: Mapping[str, float] = {}
    if relative:
        sums = {place.name: float(part.sum()) for place, part in parts.items()}
        by = divisors(sums, unavoidable_parameters(program, groups.labels, sums))
    for place, part in parts.items():
        np.add.at(values, groups.channels_of(place), part / by.get(place.name, 1.0))
    return values


def last_where_unseen(
    program: Program,
    groups: DependencyGroups,
    measure: Callable[[Place, Tensor], NDArray[np.float64] | None],
    *,
    relative: bool = False,
) -> NDArray[np.float64]:
    """Return `sum_over_places`, and for channels that `measure` saw nowhere a value far above all others.

    It is finite, and means that the budget takes these channels last.
    """

    def seen(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
        found = measure(place, tensor)
        return None if found is None else np.ones(len(found))

    values = sum_over_places(program, groups, measure, relative=relative)
    counts = sum_over_places(program, groups, seen)
    values[counts == 0] = 1e6 * max(1.0, float(values.max(initial=0.0)))
    return values
