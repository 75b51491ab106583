"""Wanda: weights times the size of what they read, on real data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphprune.contract import Context, Facts, Pass
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, sum_over_places
from graphprune.second_order.calibration import collect
from graphprune.second_order.layers import layers
from graphprune.training.drawn_samples import DrawnSamples

__all__ = ["Wanda"]


@dataclass(frozen=True, kw_only=True)
class Wanda(Pass):
    """Score a channel by the weights of the layers that read it, each times the root mean square of its input.

        score_c = sum over layers that read c, over the columns j of c, of  sum_i |W_ij| * rms(y_j)

    Channels that no linear or convolution layer sums over score nothing by themselves. Labels are not looked at.

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", equation 1; the sum
    over a channel's weights is our reconstruction, and shares (`relative`) are our own (docs/experiments.md, 9).
    """

    name: ClassVar[str] = "wanda"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    num_samples: int = 512
    """How many training samples to run."""
    batch_size: int = 64
    """Samples in a batch."""
    task: str = ""
    """How samples are read, ``package.module:factory`` of a `graphprune.training.Task`; empty: (inputs, label)."""
    relative: bool = True
    """Count shares in layers that everything goes through; false: sums everywhere."""

    def check(self, context: Context) -> None:
        """Look at the data and the task."""
        DrawnSamples.check(self, context)

    def run(self, program: Program, context: Context) -> Scores:
        """Run the data through the program and return the scores."""
        groups = context.need(DependencyGroups)
        samples = DrawnSamples.of(self, program, context)
        tensors = dict(program.named_tensors())
        readers = {
            layer.node: layer
            for layer in layers(program)
            if layer.groups == 1 and Place(layer.weight, 1) in groups.places
        }
        with context.progress.task("second moments", total=len(samples)) as task:

            def batches() -> Iterator[tuple[Tensor, ...]]:
                for inputs in samples:
                    yield inputs
                    task.advance()

            with samples.told_by_shape():
                moments = collect(
                    program, batches(), list(readers), device=context.device, bias=False
                )
        parts: dict[str, NDArray[np.float64]] = {}
        for node, layer in readers.items():
            weight = tensors[layer.weight].detach().abs().double()
            rms = moments[node].gram[0].diagonal().clamp(min=0).sqrt()
            columns = (weight.flatten(1).sum(0).cpu() * rms).view(weight.shape[1], -1).sum(1)
            parts[layer.weight] = parts.get(layer.weight, 0.0) + columns.numpy()

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            return parts.get(place.name) if place.dim == 1 else None

        values = sum_over_places(program, groups, measure, relative=self.relative)
        return Scores(values=values, method=self.spec())
