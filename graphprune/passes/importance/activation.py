"""Mean activation: how large a channel is where it is read, on real data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from graphprune.errors import DataError
from graphprune.groups import DependencyGroups
from graphprune.labels import TensorInfo
from graphprune.pipeline import Context, Facts, Pass
from graphprune.program import Program
from graphprune.scores import Scores

__all__ = ["MeanActivation"]


@dataclass(frozen=True, kw_only=True)
class MeanActivation(Pass):
    """Score a channel by its mean absolute activation, summed over the operators that read it.

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section
    2.2.
    """

    name: ClassVar[str] = "activation"
    requires: ClassVar[tuple[type[Facts], ...]] = (DependencyGroups,)
    is_method: ClassVar[bool] = True

    num_samples: int = 512
    """How many training samples to run."""
    batch_size: int = 64
    """Samples in a batch."""

    def run(self, program: Program, context: Context) -> Scores:
        """Run the data through the program and return the mean absolute activations."""
        groups = context.need(DependencyGroups)
        if context.data is None:
            raise DataError(
                f"method {self.name} expected training data, found none; give data= or --data"
            )
        recorder = _Recorder(program.clone().module.to(context.device), groups)
        loader = context.data.train(self.batch_size, seed=context.seed, limit=self.num_samples)
        batches = 0
        with (
            torch.inference_mode(),
            context.progress.task("activations", total=len(loader)) as task,
        ):
            for inputs, _ in loader:
                recorder.run(inputs.to(context.device))
                batches += 1
                task.advance()
        return Scores(values=recorder.values / max(1, batches), method=self.spec())


class _Recorder(fx.Interpreter):
    """Adds up the mean absolute value of every channel at the nodes that consumers read."""

    def __init__(self, module: fx.GraphModule, groups: DependencyGroups) -> None:
        super().__init__(module)
        self.groups = groups
        self.values = np.zeros(groups.num_channels)
        consumers = {c.node for c in groups.labels.consumers}
        nodes = [n for n in module.graph.nodes if n.name in consumers]
        self.read = {source.name for node in nodes for source in node.all_input_nodes}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        info = self.groups.labels.values[n.name]
        if n.name in self.read and isinstance(info, TensorInfo) and isinstance(result, Tensor):
            if result.is_floating_point() and n.op != "get_attr":
                self._record(info, result.detach().abs())
        return result

    def _record(self, info: TensorInfo, magnitude: Tensor) -> None:
        for field in info.fields:
            others = [d for d in range(magnitude.dim()) if d not in field.dims]
            mean = magnitude.float().mean(others) if others else magnitude.float()
            order = sorted(range(len(field.dims)), key=field.dims.__getitem__)
            channels = self.groups.channel_of[field.atoms.transpose(order)]
            np.add.at(self.values, channels, mean.double().cpu().numpy())
