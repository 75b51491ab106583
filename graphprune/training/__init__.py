"""The training engine that passes learn with; docs/design.md describes it."""

from __future__ import annotations

from graphprune.training.engine import Outcome, Trainer
from graphprune.training.recipe import Hook, Moment, Recipe, Smaller
from graphprune.training.state_surgery import carry_optimizer, slice_tensors, write_slices
from graphprune.training.task import Task, classification, load_task

__all__ = [
    "Hook",
    "Moment",
    "Outcome",
    "Recipe",
    "Smaller",
    "Task",
    "Trainer",
    "carry_optimizer",
    "classification",
    "load_task",
    "slice_tensors",
    "write_slices",
]
