"""Magnitude: how large the weights of a channel are, wherever it lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.groups import DependencyGroups, Place
from graphprune.pipeline import Context, Facts, Pass
from graphprune.program import Program
from graphprune.scores import Scores, norms_along, sum_over_places

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pass):
    """Score a channel by the norm of all weights that belong to it: rows that make it, and columns that read it.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (L1 of filters); summed over coupled places as in
    Fang et al. 2023, "DepGraph: Towards Any Structural Pruning".
    """

    name: ClassVar[str] = "magnitude"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    norm: Literal[1, 2] = 2
    """1: sum of absolute values; 2: sum of squares, which adds up over channels and places."""
    relative: bool = False
    """Count each weight as a share of its layer's: better for networks without shortcuts."""

    def run(self, program: Program, context: Context) -> Scores:
        """Return the norm of every coupled channel."""
        groups = context.need(DependencyGroups)

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            # Vectors (biases, norms) have their own scale; the matrices that make and read a channel say more.
            if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
                return None
            norms = norms_along(tensor, place.dim, order=self.norm)
            return norms / max(norms.sum(), np.finfo(np.float64).tiny) if self.relative else norms

        values = sum_over_places(program, groups, measure)
        return Scores(values=values, method=self.spec())
