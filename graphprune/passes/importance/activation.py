"""Mean activation: how large a channel is where it is read, on real data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphprune.contract import Context, Facts, Pass
from graphprune.flow import unavoidable_nodes
from graphprune.groups import DependencyGroups
from graphprune.labels import TensorInfo
from graphprune.program import Program
from graphprune.scores import Scores, divisors
from graphprune.training.drawn_samples import DrawnSamples

__all__ = ["MeanActivation"]


@dataclass(frozen=True, kw_only=True)
class MeanActivation(Pass):
    """Score a channel by its mean absolute activation, summed over the operators that read it.

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section
    2.2; shares (`relative`) are our own (docs/experiments.md, 9).
    """

    name: ClassVar[str] = "activation"
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
        """Run the data through the program and return the mean absolute activations."""
        groups = context.need(DependencyGroups)
        samples = DrawnSamples.of(self, program, context)
        recorder = _Recorder(program.clone().module.to(context.device), groups)
        with (
            torch.inference_mode(),
            samples.told_by_shape(),
            context.progress.task("activations", total=len(samples)) as task,
        ):
            for inputs in samples:
                recorder.run(*(x.to(context.device) for x in inputs))
                task.advance()
        read = recorder.by_reader()
        totals = {n: float(sum(part.sum() for _, part in parts)) for n, parts in read.items()}
        by = dict.fromkeys(read, float(max(1, len(samples))))
        if self.relative:
            by = divisors(totals, unavoidable_nodes(program, groups.labels))
        values = np.zeros(groups.num_channels)
        for reader, parts in read.items():
            for channels, part in parts:
                np.add.at(values, channels, part / by[reader])
        return Scores(values=values, method=self.spec())


_Part = tuple[NDArray[np.intp], NDArray[np.float64]]
"""Coupled channels, and a number for each of them."""


class _Recorder(fx.Interpreter):
    """Adds up the mean absolute value of every channel of the tensors that consumers read."""

    def __init__(self, module: fx.GraphModule, groups: DependencyGroups) -> None:
        super().__init__(module)
        self.groups = groups
        consumers = {c.node for c in groups.labels.consumers}
        self.readers = {
            n.name: [source.name for source in n.all_input_nodes]
            for n in module.graph.nodes
            if n.name in consumers
        }
        """Consumer -> nodes whose outputs it reads."""
        self.sums: dict[str, _Part] = {}
        """Such a node -> its coupled channels, and for each the sum of means over batches."""
        self.read = {name for sources in self.readers.values() for name in sources}

    def by_reader(self) -> dict[str, list[_Part]]:
        """Return, for each consumer, what was added up of every tensor that it reads."""
        return {
            reader: [self.sums[name] for name in sources if name in self.sums]
            for reader, sources in self.readers.items()
        }

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        info = self.groups.labels.values[n.name]
        if n.name in self.read and isinstance(info, TensorInfo) and isinstance(result, Tensor):
            if info.fields and result.is_floating_point() and n.op != "get_attr":
                channels, means = self._means(info, result.detach().abs())
                before = self.sums[n.name][1] if n.name in self.sums else 0.0
                self.sums[n.name] = channels, before + means
        return result

    def _means(self, info: TensorInfo, magnitude: Tensor) -> _Part:
        """Return the coupled channels of all fields, and the mean of each of them."""
        channels, means = [], []
        for field in info.fields:
            others = [d for d in range(magnitude.dim()) if d not in field.dims]
            mean = magnitude.float().mean(others) if others else magnitude.float()
            order = sorted(range(len(field.dims)), key=field.dims.__getitem__)
            channels.append(self.groups.channel_of[field.atoms.transpose(order)].ravel())
            means.append(mean.double().cpu().numpy().ravel())
        return np.concatenate(channels), np.concatenate(means)
