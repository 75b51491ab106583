"""Some training samples for a pass that looks at a few: drawn at random, in batches that the program takes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor
from torch.utils.data import DataLoader

from graphprune.errors import DataError
from graphprune.pipeline import Context
from graphprune.program import Program
from graphprune.training.samples import must_have_ranks
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
    task: Task
    loader: DataLoader[Any]

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
            DataError: There is no data, nothing is to be drawn, or it does not fill one batch of the program.
        """
        batch_size: int = getattr(step, "batch_size", 1)
        if context.data is None:
            raise DataError(f"{step.name} expected training data, found none; give data= or --data")
        if step.num_samples < 1 or batch_size < 1:
            raise DataError(
                f"{step.name} needs at least one sample, found num_samples={step.num_samples} batch_size={batch_size}"
            )
        reader, fixed = load_task(step.task), program.fixed_batch

        def load(limit: int) -> DataLoader[Any]:
            assert context.data is not None
            return context.data.train(
                fixed or batch_size,
                shuffle=shuffle,
                seed=context.seed,
                limit=limit,
                collate=reader.collate,
            )

        loader = load(step.num_samples)
        if fixed is not None:
            count = len(cast("Sized", loader.dataset))
            if not (whole := count - count % fixed):
                raise DataError(
                    f"{step.name}: {program.source} takes batches of {fixed} samples only, and there are {count} "
                    "to look at; give more, or capture the model with fewer samples as example inputs"
                )
            loader = load(whole)
        return cls(program=program, task=reader, loader=loader)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs of each batch.

        Raises:
            DataError: The program takes more of them, or fewer, or of another rank.
        """
        for batch in self.batches():
            inputs, _ = self.task.read(batch)
            must_have_ranks(self.program, inputs)
            yield inputs

    def batches(self) -> Iterator[Any]:
        """Yield the batches as the data gives them, targets included."""
        yield from self.loader
