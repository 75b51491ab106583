"""A program in training: where it computes and in which form, whom it learns from, and the average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.errors import UsageError
from graphprune.program import Program
from graphprune.training.average import WeightAverage
from graphprune.training.compiled import compiled
from graphprune.training.distill import Teacher
from graphprune.training.evaluation import put_in_evaluation
from graphprune.training.features import insert_taps, stages
from graphprune.training.forms import training_form
from graphprune.training.mixup import Blend
from graphprune.training.placement import Placement
from graphprune.training.recipe import Recipe, Smaller, trained_parameters
from graphprune.training.samples import told_by_shape
from graphprune.training.state_surgery import all_tensors
from graphprune.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Student", "lay_down"]


class Student:
    """One program while it is trained."""

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        task: Task,
        accelerator: Accelerator,
        *,
        dense: Program | None,
        steps: int,
        after: Student | None = None,
    ) -> None:
        """Bring `program` to its device, in the form that trains its parameters in place.

        Args:
            program: What is trained.
            recipe: How.
            task: What for.
            accelerator: Where, in what precision, and with how many processes.
            dense: Whose outputs to learn from, where the recipe distills.
            steps: How many steps it will be trained, counted from where it came.
            after: What was trained before a surgery; its teacher goes on where it can.

        Raises:
            UsageError: The recipe asks for a teacher, and there is none; or nothing can be trained.
        """
        self.program = program
        self.recipe = recipe
        self.task = task
        self.accelerator = accelerator
        self.dense = dense
        self.parameters = trained_parameters(program)
        several = accelerator.num_processes > 1
        self.placement = Placement(program, task, accelerator.device)
        # A teacher that shows what is inside it shows what this program has as well: then another one comes.
        self.teacher: Teacher | None = (
            after.teacher if after is not None and not recipe.features else self._teacher(steps)
        )
        form = training_form(program, synchronised=several)
        self.taps = insert_taps(form, self.teacher.stages if self.teacher is not None else {})
        steps = 0 if several or self.taps else steps
        self.model = accelerator.prepare(compiled(form, device=accelerator.device, steps=steps))
        self.average = (
            WeightAverage(dict(program.named_tensors()), recipe.average) if recipe.average else None
        )

    def _teacher(self, steps: int) -> Teacher | None:
        recipe = self.recipe
        if not recipe.distill and not recipe.features:
            return None
        if self.dense is None:
            raise UsageError(
                "distill= and features= need a teacher, found none; or leave them at 0"
            )
        return Teacher(
            self.dense,
            self.task,
            temperature=recipe.temperature,
            mirror=recipe.mirror,
            device=self.accelerator.device,
            memory_format=self.placement.memory_format,
            compares_outputs=recipe.distill > 0,
            stages=stages(self.program, self.dense) if recipe.features else {},
            steps=steps,
        )

    def smaller(self, surgery: Smaller, *, steps: int) -> Student:
        """Return what goes on after a surgery, for so many steps, with its part of the average."""
        student = Student(
            surgery.program,
            self.recipe,
            self.task,
            self.accelerator,
            dense=self.dense,
            steps=steps,
            after=self,
        )
        if self.average is not None:
            tensors = all_tensors(surgery.program.module)
            student.average = self.average.carried(tensors, surgery.slices)
        lay_down(self.program)
        return student

    def loss(
        self,
        inputs: tuple[Tensor, ...],
        target: Any,
        blend: Blend | None,
        gates: Mapping[str, Tensor],
    ) -> tuple[Any, Tensor]:
        """Return the outputs for a batch, and the loss with what the teacher says of them.

        Args:
            inputs: Of the batch.
            target: Of the batch.
            blend: How its samples are blended; None: they are not.
            gates: How much each channel counts of a node whose tensor is compared, where some count less.
        """
        recipe = self.recipe
        if blend is not None:
            inputs = blend.inputs(inputs)
        with self.accelerator.autocast():
            with told_by_shape(self.program, inputs):
                outputs = self.model(*inputs)
            loss = self.task.loss(outputs, target)
            if blend is not None:
                others = self.task.loss(outputs, blend.neighbours(target))
                loss = blend.share * loss + (1.0 - blend.share) * others
            if self.teacher is not None:
                dense = self.teacher.look(inputs)
                if share := recipe.distill:
                    loss = (1.0 - share) * loss + share * self.teacher.distance(outputs, dense)
                if weight := recipe.features:
                    loss = loss + weight * self.teacher.feature_distance(self.taps, gates)
        return outputs, loss

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the program and of its average."""
        return {
            "tensors": {name: t.detach() for name, t in self.program.named_tensors()},
            "average": None if self.average is None else self.average.state(),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        for name, tensor in self.program.named_tensors():
            tensor.copy_(state["tensors"][name])
        if self.average is not None:
            self.average.load_state(state["average"])


def lay_down(program: Program, home: torch.device | None = None) -> None:
    """Leave a program as programs lie about: in evaluation mode, without gradients, and in its home if it has one."""
    put_in_evaluation(program.module)
    for parameter in program.module.parameters():
        parameter.grad = None
    if home is not None:
        program.module.to(home).to(memory_format=torch.contiguous_format)
