"""Samples that do not fit a program: what it takes, and what the data gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import DataError
from graphprune.exported import first_line
from graphprune.program import Program

__all__ = ["must_be_labels", "must_have_ranks", "told_by_shape"]

_IGNORED = -100
"""A label that cross-entropy leaves out."""


def must_have_ranks(program: Program, inputs: Sequence[Tensor]) -> None:
    """Check that samples have as many dimensions as the program's; sizes are its own affair.

    Raises:
        DataError: They have not, or there are more inputs, or fewer.
    """
    if [t.dim() for t in inputs] != [t.dim() for t in program.example_inputs]:
        raise DataError(_difference(program, inputs))


@contextmanager
def told_by_shape(program: Program, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Say of what fails inside that the samples have other shapes than the program's, where they have.

    Raises:
        DataError: The program failed on samples of other shapes.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _shapes(inputs) == _shapes(program.example_inputs):
            raise
        raise DataError(
            f"{_difference(program, inputs)}, and on these it fails: {first_line(error)}; "
            "give data of that shape, or capture the model with inputs such as the data's"
        ) from error


def must_be_labels(target: Any, classes: int, where: str) -> None:
    """Check labels against the number of logits, while they are on the CPU: a GPU tells of a wrong one by giving up.

    Raises:
        DataError: A label is of no class.
    """
    if not isinstance(target, Tensor) or target.is_floating_point():
        return
    wrong = target[(target >= classes) | ((target < 0) & (target != _IGNORED))]
    if wrong.numel():
        raise DataError(
            f"expected labels from 0 to {classes - 1}, because the model tells {classes} classes apart, found "
            f"{int(wrong[0])} in the {where}; give data of these classes, or a model with an output for each label"
        )


def _difference(program: Program, inputs: Sequence[Tensor]) -> str:
    return (
        f"the program takes samples of shape {_shapes(program.example_inputs)}, "
        f"the data gives {_shapes(inputs)}"
    )


def _shapes(batch: Sequence[Tensor]) -> str:
    return " and ".join("x".join(map(str, t.shape[1:])) or "()" for t in batch)
