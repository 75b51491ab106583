"""First-order Taylor: how much the loss would change if a channel's weights became zero.

|L(w) - L(w without channel c)|  ~  |sum over the channel's weights of  w * dL/dw|
"""

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
from graphprune.scores import Scores, along, sum_over_places
from graphprune.training.drawn_samples import DrawnSamples

__all__ = ["Taylor"]


@dataclass(frozen=True, kw_only=True)
class Taylor(Pass):
    """Score a channel by the first-order change of the loss when its weights vanish.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 (summed before the
    square).
    """

    name: ClassVar[str] = "taylor"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    num_samples: int = 512
    """How many training samples the gradient is taken over."""
    batch_size: int = 64
    """Samples in a batch."""
    task: str = ""
    """What the loss is, ``package.module:factory`` of a `graphprune.training.Task`; empty: cross-entropy."""

    def check(self, context: Context) -> None:
        """Look at the data and the task."""
        DrawnSamples.check(self, context)

    def run(self, program: Program, context: Context) -> Scores:
        """Accumulate the gradient of the loss and return the scores."""
        groups = context.need(DependencyGroups)
        samples = DrawnSamples.of(self, program, context)
        clone = program.clone()
        clone.module.to(context.device).requires_grad_(True)
        with torch.enable_grad(), context.progress.task("gradients", total=len(samples)) as shown:
            for batch in samples.batches():
                samples.task.loss_of(clone, batch, context.device).backward()
                shown.advance()

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            if not isinstance(tensor, nn.Parameter) or tensor.grad is None:
                return None
            return np.abs(along(tensor.detach() * tensor.grad, place.dim))

        values = sum_over_places(clone, groups, measure)
        return Scores(values=values / max(1, len(samples)), method=self.spec())
