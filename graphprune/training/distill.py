"""Distillation: the cut program learns what the dense one says, besides what is true.

    loss = (1 - weight) * task + weight * T^2 * KL(softmax(dense / T) || softmax(cut / T))

What it does inside can count as well (`features`). The mean of what it says of an image and of its mirror image is a
better teacher than either, as it is a better answer (test-time augmentation: Krizhevsky, Sutskever and Hinton 2012,
"ImageNet Classification with Deep Convolutional Neural Networks", section 4.1); to learn from it is our own.

Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphprune.errors import DataError, UsageError
from graphprune.exported import flat_outputs
from graphprune.program import Program
from graphprune.training.compiled import compiled
from graphprune.training.features import Tap, insert_taps, taps_distance
from graphprune.training.task import Task

__all__ = ["Teacher", "logit_distance", "must_be_comparable"]


def logit_distance(outputs: Any, dense: Any, *, temperature: float) -> Tensor:
    """Return T^2 KL(dense || cut) of the first outputs, as a mean over the samples."""
    student = F.log_softmax(flat_outputs(outputs)[0].float() / temperature, dim=1)
    teacher = F.log_softmax(flat_outputs(dense)[0].float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def must_be_comparable(task: Task, *, compares_outputs: bool, mirror: bool) -> None:
    """Check that two programs can be compared on this task.

    Raises:
        UsageError: The task has no way to compare outputs, or a mirror image may have another answer.
    """
    if compares_outputs and task.distill is None and not task.is_classification:
        raise UsageError(
            "distillation compares logits, and the task is no classification; "
            "give the Task a distill function, or distill=0"
        )
    if mirror and not task.is_classification:
        raise UsageError(
            "mirror=true takes it that an image and its mirror image have the same outputs, and the task is "
            "no classification; use mirror=false"
        )


class Teacher:
    """The dense program in evaluation mode, and the distance of another program's outputs from its own."""

    def __init__(
        self,
        program: Program,
        task: Task,
        *,
        temperature: float,
        mirror: bool = False,
        device: torch.device,
        memory_format: torch.memory_format,
        compares_outputs: bool = True,
        stages: Mapping[str, tuple[int, ...]] | None = None,
        steps: int = 0,
    ) -> None:
        """Take a copy of `program` to `device`; the program itself stays where it is.

        Args:
            program: The dense program.
            task: Says how outputs are compared, if not as logits.
            temperature: Of the logits.
            mirror: Whether it looks at the mirror image of each image too.
            device: Where the student is.
            memory_format: As the student's.
            compares_outputs: Whether `distance` will be asked for, and not `feature_distance` alone.
            stages: Nodes whose tensors are compared, and the dimensions of their channels.
            steps: How many batches it will see in the whole run.

        Raises:
            UsageError: The task has no way to compare two programs, or a mirror image may have another answer.
        """
        must_be_comparable(task, compares_outputs=compares_outputs, mirror=mirror)
        self.task = task
        self.temperature = temperature
        self.mirror = mirror
        graph = program.clone().module.requires_grad_(False)
        graph.to(device).to(memory_format=memory_format)
        self.stages = stages or {}
        self.taps = insert_taps(graph, self.stages)
        module: nn.Module = graph
        if self.stages:  # taps keep what passes by; a compiled module passes less by
            steps = 0
        elif not graph.training and _calls_modules_once(graph):
            module = fuse(graph, inplace=True, no_trace=True)  # norms into convolutions
        self.module = compiled(module, device=device, steps=steps, is_frozen=True)

    def look(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return what the dense program says of `inputs`; its taps hold what it thinks on the way.

        Raises:
            DataError: It is to look at mirror images, and an input is no batch of images.
        """
        with torch.no_grad():
            if not self.mirror:
                return self.module(*inputs)
            mirrored = self.module(*map(_mirrored, inputs))  # first: taps keep what passes last
            return pytree.tree_map(_mean, self.module(*inputs), mirrored)

    def feature_distance(self, taps: Mapping[str, Tap], gates: Mapping[str, Tensor]) -> Tensor:
        """Return how far the maps that `taps` hold are from the dense program's, after `look`.

        Args:
            taps: Those of the student.
            gates: Which channels of a tap count, for the taps that have gates.
        """
        return taps_distance(taps, self.taps, self.stages, gates)

    def distance(self, outputs: Any, dense: Any) -> Tensor:
        """Return how far `outputs` are from `dense`, the dense program's."""
        if self.task.distill is not None:
            return self.task.distill(outputs, dense)
        return logit_distance(outputs, dense, temperature=self.temperature)


def _mirrored(images: Tensor) -> Tensor:
    if images.dim() != 4:
        raise DataError(
            f"mirror=true expected images, [batch, channels, height, width], found {list(images.shape)}; "
            "use mirror=false"
        )
    return images.flip(-1)


def _mean(one: Any, other: Any) -> Any:
    return (one + other) / 2 if isinstance(one, Tensor) else one


def _calls_modules_once(graph: fx.GraphModule) -> bool:
    """Return whether no module is called twice: a convolution that is takes the norm behind one call alone."""
    called = [node.target for node in graph.graph.find_nodes(op="call_module")]
    return len(called) == len(set(called))
