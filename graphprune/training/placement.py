"""A program on its device: the layout of its images, and batches as it takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.exported import flat_outputs
from graphprune.program import Program
from graphprune.training.samples import must_be_labels, must_have_ranks, told_by_shape
from graphprune.training.task import Task

__all__ = ["Placement", "fastest_layout", "laid_out"]


class Placement:
    """Where and in what layout a program computes, and how a batch gets there."""

    def __init__(self, program: Program, task: Task, device: torch.device) -> None:
        """Move `program` to `device`, in the layout in which its convolutions are fastest."""
        self.program = program
        self.task = task
        self.device = device
        self.memory_format = fastest_layout(program)
        self.fixed_batch = program.fixed_batch
        program.module.to(device).to(memory_format=self.memory_format)
        self.classes = self._classes() if task.is_classification else None

    def place(self, batch: Any, *, where: str = "training set") -> tuple[tuple[Tensor, ...], Any]:
        """Return the inputs and the target of a batch, where and as the program wants them.

        Raises:
            DataError: The inputs do not fit the program, or it knows no such class; names `where` they come from.
        """
        inputs, target = self.task.read(batch)
        must_have_ranks(self.program, inputs)
        if self.classes is not None:
            must_be_labels(target, self.classes, where)
        return self._moved(inputs), pytree.tree_map_only(
            Tensor, lambda t: t.to(self.device, non_blocking=True), target
        )

    def evaluate(self, inputs: tuple[Tensor, ...]) -> Any:
        """Return the program's outputs; where its batch is fixed, missing samples are filled in and dropped again.

        Raises:
            DataError: The program does not take samples of this shape.
        """
        with told_by_shape(self.program, inputs):
            return self._outputs(inputs)

    def _moved(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return laid_out(inputs, self.memory_format, self.device)

    def _outputs(self, inputs: tuple[Tensor, ...]) -> Any:
        module, fixed, count = self.program.module, self.fixed_batch, len(inputs[0])
        if fixed is None or count == fixed:
            return module(*inputs)
        filled = (torch.cat([t, t[-1:].expand(fixed - count, *t.shape[1:])]) for t in inputs)
        return pytree.tree_map_only(Tensor, lambda t: t[:count], module(*filled))

    @torch.no_grad()
    def _classes(self) -> int | None:
        """Return how many logits a sample gets; None where the first output is no row of them."""
        logits = flat_outputs(self._outputs(self._moved(self.program.batch(2))))[0]
        return logits.shape[1] if logits.dim() == 2 else None


def laid_out(
    inputs: tuple[Tensor, ...], layout: torch.memory_format, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Return `inputs` on `device`, images among them in `layout`."""
    return tuple(
        t.to(
            device,
            non_blocking=True,
            memory_format=layout if t.dim() == 4 else torch.preserve_format,
        )
        for t in inputs
    )


def fastest_layout(program: Program) -> torch.memory_format:
    """Return channels_last for images, where the graph takes them so."""
    if not any(example.dim() == 4 for example in program.example_inputs):
        return torch.contiguous_format
    home = next((t.device for _, t in program.named_tensors()), torch.device("cpu"))
    inputs = laid_out(program.batch(2), torch.channels_last, home)
    module = program.clone().module.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            module(*inputs)
    # A `view` in the user's code, or in a graph of torch.export, may be written for one layout only.
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return torch.contiguous_format
    return torch.channels_last
