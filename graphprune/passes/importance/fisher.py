"""Fisher: the second-order change of the loss when a channel's weights vanish, from gradients of single samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.contract import Context, Facts, Pass
from graphprune.errors import UsageError
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, along, sum_over_places
from graphprune.training.drawn_samples import DrawnSamples

__all__ = ["Fisher"]


@dataclass(frozen=True, kw_only=True)
class Fisher(Pass):
    """Score a channel by the empirical Fisher information of a gate on its weights.

        score_c = 1/2 * mean over samples n of  (sum over the channel's weights of  w * dL_n/dw)^2

    In contrast to `taylor`, gradients of different samples cannot cancel out.

    Source: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", with a gate on a coupled
    channel's weights in the place of one on its activation: our reconstruction.
    """

    name: ClassVar[str] = "fisher"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    num_samples: int = 256
    """How many training samples to take gradients of, one at a time."""
    task: str = ""
    """What the loss is, ``package.module:factory`` of a `graphprune.training.Task`; empty: cross-entropy."""

    def check(self, context: Context) -> None:
        """Look at the data and the task."""
        DrawnSamples.check(self, context)

    def run(self, program: Program, context: Context) -> Scores:
        """Square and average the gradients and return the scores."""
        groups = context.need(DependencyGroups)
        if program.fixed_batch not in (None, 1):
            raise UsageError(
                f"{self.name} takes gradients of single samples, and {program.source} takes batches of "
                f"{program.fixed_batch} only; capture it with one sample as example input, or use taylor"
            )
        samples = DrawnSamples.of(self, program, context)
        clone = program.clone()
        module = clone.module.to(context.device).requires_grad_(True)
        values = np.zeros(groups.num_channels)

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            if not isinstance(tensor, nn.Parameter) or tensor.grad is None:
                return None
            return along(tensor.detach() * tensor.grad, place.dim)

        with torch.enable_grad(), context.progress.task("gradients", total=len(samples)) as shown:
            for batch in samples.batches():
                module.zero_grad()
                samples.task.loss_of(clone, batch, context.device).backward()
                values += sum_over_places(clone, groups, measure) ** 2
                shown.advance()
        return Scores(values=values / (2 * max(1, len(samples))), method=self.spec())
