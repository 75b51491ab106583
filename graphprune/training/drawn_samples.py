"""Some training samples for a pass that looks at a few: drawn at random, in batches that the program takes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor
from torch.utils.data import DataLoader

from graphprune.contract import Context
from graphprune.errors import DataError, GraphpruneError, UsageError
from graphprune.program import Program
from graphprune.training.samples import must_have_ranks, told_by_shape
from graphprune.training.task import Task, load_task

__all__ = ["DrawnSamples"]


class _Draws(Protocol):
    """A pass that draws samples, one by one unless it has an option ``batch_size``."""

    name: ClassVar[str]

    @property
    def num_samples(self) -> int:
        """How many samples at most."""

    @property
    def task(self) -> str:
        """How they are read, package.module:factory of a `graphprune.training.Task`; empty: (inputs, label)."""


@dataclass(frozen=True, kw_only=True)
class DrawnSamples:
    """Batches of training samples; iterating gives their inputs, one tensor per graph input, again each time."""

    program: Program
    """What they are for."""
    task: Task
    """Reads a batch."""
    has_task: bool
    """Whether the user gave it; else the inputs come first in a sample, whatever follows them."""
    loader: DataLoader[Any]
    """Batches as the data gives them."""

    @classmethod
    def of(
        cls,
        step: _Draws,
        program: Program,
        context: Context,
        *,
        shuffle: bool = True,
    ) -> DrawnSamples:
        """Draw samples for a pass, with the run's seed.

        Args:
            step: The pass: its name, for messages, and its options.
            program: What they are for. Where its batch is fixed, batches are of that size, whatever the pass says, and
                samples that fill none are left out.
            context: Has the data.
            shuffle: Whether each iteration has an order of its own.

        Raises:
            DataError: There is no data, or it does not fill one batch of the program.
            UsageError: As for `check`.
        """
        cls.check(step, context)
        batch_size: int = getattr(step, "batch_size", 1)
        reader, fixed, data = load_task(step.task), program.fixed_batch, context.data
        assert data is not None

        def load(limit: int) -> DataLoader[Any]:
            return data.train(
                fixed or batch_size,
                shuffle=shuffle,
                seed=context.seed,
                limit=limit,
                collate=reader.collate,
            )

        try:
            loader = load(step.num_samples)
        except ValueError as error:  # of torch, where there is nothing to draw from
            raise DataError(
                f"{step.name}: cannot draw from the training set of {data.name!r}: {error}"
            ) from error
        if fixed is not None:
            count = len(cast("Sized", loader.dataset))
            if not (whole := count - count % fixed):
                raise DataError(
                    f"{step.name}: {program.source} takes batches of {fixed} samples only, and there are {count} "
                    "to look at; give more, or capture the model with fewer samples as example inputs"
                )
            loader = load(whole)
        return cls(program=program, task=reader, has_task=bool(step.task), loader=loader)

    @staticmethod
    def check(step: _Draws, context: Context) -> None:
        """Look at what a pass wants to draw, before the first pass runs.

        Raises:
            DataError: There is no data.
            UsageError: Nothing is to be drawn, or there is no such task.
        """
        batch_size: int = getattr(step, "batch_size", 1)
        if context.data is None:
            raise DataError(f"{step.name} expected training data, found none; give data= or --data")
        if step.num_samples < 1 or batch_size < 1:
            raise UsageError(
                f"{step.name} needs at least one sample, found num_samples={step.num_samples} batch_size={batch_size}"
            )
        load_task(step.task)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs of each batch.

        Raises:
            DataError: The program takes more of them, or fewer, or of another rank.
        """
        for batch in self.batches():
            inputs = self._inputs(batch)
            must_have_ranks(self.program, inputs)
            yield inputs

    @contextmanager
    def told_by_shape(self) -> Iterator[None]:
        """Say of what fails inside that the samples have other shapes than the program's, where they have.

        Raises:
            DataError: The program failed on samples of other shapes.
        """
        try:
            yield
        except GraphpruneError:
            raise
        except RuntimeError:
            with told_by_shape(self.program, next(iter(self))):
                raise

    def _inputs(self, batch: Any) -> tuple[Tensor, ...]:
        if self.has_task or not isinstance(batch, (tuple, list)) or len(batch) == 2:
            return self.task.read(batch)[0]
        return (batch[0],)  # samples without a label, or with more than one

    def batches(self) -> Iterator[Any]:
        """Yield the batches as the data gives them, targets included."""
        yield from self.loader
