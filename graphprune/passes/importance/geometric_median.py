"""Geometric median: how far a channel's filter is from the other filters of its layer, which could stand in for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, last_where_unseen

__all__ = ["GeometricMedian"]


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Pass):
    """Score a channel by the distances of its filters to the others of the same layers.

        score_c = sum over layers that make c, over the layer's filters j, of  ||w_c - w_j||_2

    A filter near the geometric median of all is the easiest to replace. Channels that no filter makes stay to the last.
    A norm behind a layer makes the scale of its filters mean nothing, so distances count as shares of all distances
    in their layer (`relative`).

    Source: He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration";
    summed over coupled places; shares as in Torch-Pruning's normalisation.
    """

    name: ClassVar[str] = "geometric-median"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    relative: bool = True
    """Count shares of each layer; false: distances as they are."""

    def run(self, program: Program, context: Context) -> Scores:
        """Return the sum of distances of every coupled channel."""
        groups = context.need(DependencyGroups)

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2 or place.dim:
                return None
            filters = tensor.detach().flatten(1).double()
            distances = torch.cdist(filters, filters).sum(1)
            if self.relative:
                distances /= distances.sum().clamp(min=torch.finfo(distances.dtype).tiny)
            found: NDArray[np.float64] = distances.cpu().numpy()
            return found

        values = last_where_unseen(program, groups, measure)
        return Scores(values=values, method=self.spec())
