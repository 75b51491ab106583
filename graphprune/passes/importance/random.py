"""Random scores: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups
from graphprune.program import Program
from graphprune.scores import Scores

__all__ = ["RandomScores"]


@dataclass(frozen=True, kw_only=True)
class RandomScores(Pass):
    """Score every channel at random, by the run's seed."""

    name: ClassVar[str] = "random"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Scores:
        """Return uniform numbers."""
        groups = context.need(DependencyGroups)
        values = np.random.default_rng(context.seed).random(groups.num_channels)
        return Scores(values=values, method=self.spec())
