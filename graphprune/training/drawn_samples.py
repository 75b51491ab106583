"""Some training samples for a pass that looks at a few: drawn at random, in batches that the program takes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader

from graphprune.errors import DataError
from graphprune.pipeline import Context
from graphprune.program import Program
from graphprune.training.samples import must_have_ranks
from graphprune.training.task import Task, load_task

__all__ = ["DrawnSamples"]


@dataclass(frozen=True, kw_only=True)
class DrawnSamples:
    """Batches of training samples; iterating gives their inputs, one tensor per graph input, again each time."""

    program: Program
    task: Task
    loader: DataLoader[Any]

    @classmethod
    def of(
        cls,
        program: Program,
        context: Context,
        *,
        name: str,
        batch_size: int,
        num_samples: int,
        task: str = "",
        shuffle: bool = True,
    ) -> DrawnSamples:
        """Draw samples with the run's seed.

        Args:
            program: What they are for. Where its batch is fixed, batches are of that size, whatever `batch_size` says,
                and samples that fill none are left out.
            context: Has the data.
            name: The pass, for messages.
            batch_size: Samples in a batch; the last one may be smaller.
            num_samples: How many to draw at most.
            task: How samples are read, package.module:factory of a `graphprune.training.Task`; empty: (inputs, label).
            shuffle: Whether each iteration has an order of its own.

        Raises:
            DataError: There is no data, nothing is to be drawn, or it does not fill one batch of the program.
        """
        if context.data is None:
            raise DataError(f"{name} expected training data, found none; give data= or --data")
        if num_samples < 1 or batch_size < 1:
            raise DataError(
                f"{name} needs at least one sample, found num_samples={num_samples} batch_size={batch_size}"
            )
        reader, fixed = load_task(task), program.fixed_batch

        def load(limit: int) -> DataLoader[Any]:
            assert context.data is not None
            return context.data.train(
                fixed or batch_size,
                shuffle=shuffle,
                seed=context.seed,
                limit=limit,
                collate=reader.collate,
            )

        loader = load(num_samples)
        if fixed is not None:
            count = len(cast("Sized", loader.dataset))
            if not (whole := count - count % fixed):
                raise DataError(
                    f"{name}: {program.source} takes batches of {fixed} samples only, and there are {count} "
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
