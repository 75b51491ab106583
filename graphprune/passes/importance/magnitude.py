"""Magnitude: how large the weights of a channel are, wherever it lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from graphprune.contract import Context, Facts, Pass
from graphprune.flow import first_users, unavoidable_parameters
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, divisors, norms_along, sum_over_places

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pass):
    """Score a channel by the norm of all weights that belong to it: rows that make it, and columns that read it.

    Layers that a shortcut or a branch goes around are compared as they are: what training has made small there matters
    little. A layer that everything goes through matters whatever its size; of those, the columns count, as shares of
    their layer (`relative`).

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (L1 of filters); summed over coupled places as in
    Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"; shares are our own (docs/experiments.md, 7).
    """

    name: ClassVar[str] = "magnitude"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    norm: Literal[1, 2] = 2
    """1: sum of absolute values; 2: sum of squares, which adds up over channels and places."""
    relative: bool = True
    """Count shares in layers that everything goes through; false: sums everywhere."""

    def run(self, program: Program, context: Context) -> Scores:
        """Return the norm of every coupled channel."""
        groups = context.need(DependencyGroups)
        tensors = dict(program.named_tensors())
        # Vectors (biases, norms) have their own scale; the matrices that make and read a channel say more.
        norms = {
            place: norms_along(tensor, place.dim, order=self.norm)
            for place in groups.places
            if isinstance(tensor := tensors.get(place.name), nn.Parameter) and tensor.dim() > 1
        }
        counted = _in_shares(program, groups, norms) if self.relative else norms
        values = sum_over_places(program, groups, lambda place, _: counted.get(place))
        return Scores(values=values, method=self.spec())


def _in_shares(
    program: Program, groups: DependencyGroups, norms: Mapping[Place, NDArray[np.float64]]
) -> dict[Place, NDArray[np.float64]]:
    """Return norms that compare from layer to layer.

    A norm behind a layer makes the scale of its rows mean nothing, so rows of a layer that everything goes through
    count for channels alone that no column of such a layer reads.
    """
    sums = {place.name: float(values.sum()) for place, values in norms.items()}
    users = first_users(program, sums)
    through = unavoidable_parameters(program, groups.labels, sums)
    by = divisors(sums, through)
    is_read = np.zeros(groups.num_channels, dtype=bool)
    found = {place: values / by[place.name] for place, values in norms.items()}
    rows = []
    for place in norms:
        channels = groups.channels_of(place)
        summed = groups.summed_over.get(users.get(place.name, ""), ())
        if place.name in through and not np.isin(channels, summed).all():
            rows.append(place)
        else:
            is_read[channels] = True
    for place in rows:
        found[place] = np.where(is_read[groups.channels_of(place)], 0.0, found[place])
    return found
