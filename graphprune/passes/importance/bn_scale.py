"""Batch-norm scale: how strongly batch normalisation lets a channel through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.contract import Context, Facts, Pass
from graphprune.errors import UsageError
from graphprune.groups import DependencyGroups, Place
from graphprune.program import Program
from graphprune.scores import Scores, along, last_where_unseen

__all__ = ["BatchNormScale"]


@dataclass(frozen=True, kw_only=True)
class BatchNormScale(Pass):
    """Score a channel by the absolute batch-norm scales that it passes.

    Channels without a batch norm score infinitely high among those with one: they are not removed.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3; shares
    (`relative`) are our own (docs/experiments.md, 9).
    """

    name: ClassVar[str] = "bn-scale"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    relative: bool = True
    """Count shares in layers that everything goes through; false: sums everywhere."""

    def run(self, program: Program, context: Context) -> Scores:
        """Return the sum of absolute scales of every coupled channel."""
        groups = context.need(DependencyGroups)
        scales = _scales(program)
        if not scales:
            raise UsageError(
                f"method bn-scale needs batch normalisations with a scale, and {program.source} has none; "
                "use --method magnitude"
            )

        def measure(place: Place, tensor: Tensor) -> NDArray[np.float64] | None:
            return along(tensor.abs(), place.dim) if place.name in scales else None

        values = last_where_unseen(program, groups, measure, relative=self.relative)
        return Scores(values=values, method=self.spec())


def _scales(program: Program) -> set[str]:
    """Return the names of all batch-norm weights, in either dialect."""
    names = {
        f"{path}.weight"
        for path, module in program.module.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                names.add(str(weight.target))
    return names
