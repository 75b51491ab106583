"""LAMP: a magnitude that is compared with what would be left of its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, norms_along, sum_over_places

__all__ = ["Lamp"]


@dataclass(frozen=True, kw_only=True)
class Lamp(Pass):
    """Score a channel by its squared magnitude over that of all channels of its group that are at least as large.

        score_c = s_c / sum over j of the group with s_j >= s_c of s_j,     s = sum of squares over all places

    The largest channel of every group scores 1, so groups compare without a weight of their own.

    Source: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning"; for channels of a
    dependency group instead of the weights of a layer, our reconstruction.
    """

    name: ClassVar[str] = "lamp"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Scores:
        """Return the score of every coupled channel."""
        groups = context.need(DependencyGroups)

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
                return None
            return norms_along(tensor, place.dim, order=2)

        squares = sum_over_places(program, groups, measure)
        values = np.zeros_like(squares)
        for group in groups:
            ranked = group.channels[np.argsort(squares[group.channels], kind="stable")]
            left = squares[ranked][::-1].cumsum()[::-1]
            values[ranked] = np.divide(
                squares[ranked], left, out=np.zeros(len(ranked)), where=left > 0
            )
        return Scores(values=values, method=self.spec())
