"""What a model is trained for: how a batch is read, what the loss is, what is measured.

Classification by cross-entropy is the default. Anything else comes from a function ``package.module:factory`` that
takes nothing and returns a `Task`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from graphprune.errors import DataError, GraphpruneError, UsageError
from graphprune.exported import flat_outputs
from graphprune.named import find_callable
from graphprune.program import Program
from graphprune.training.samples import must_be_labels, told_by_shape

if TYPE_CHECKING:
    from graphprune.data import DataSource

__all__ = ["Task", "classification", "load_task"]


def inputs_and_target(batch: Any) -> tuple[tuple[Tensor, ...], Any]:
    """Read a batch (inputs, target), where inputs is one tensor or a sequence of them."""
    inputs, target = batch
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), target


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is trained for; outputs are what its graph returns, one tensor or a structure of them."""

    loss: Callable[[Any, Any], Tensor]
    """(outputs, target) -> the mean loss of a batch, a scalar that can be differentiated."""
    metric: Callable[[Any, Any], Tensor]
    """(outputs, target) -> the figure that people read, as a mean over the samples of a batch."""
    metric_name: str = "metric"
    """What that figure is called in progress and metrics."""
    unpack: Callable[[Any], tuple[tuple[Tensor, ...], Any]] = inputs_and_target
    """batch -> (one tensor per input of the graph, target)."""
    collate: Callable[[list[Any]], Any] = default_collate
    """Samples -> batch, for data sets that do not give whole batches themselves."""
    distill: Callable[[Any, Any], Tensor] | None = None
    """(outputs, outputs of the dense program) -> the mean loss between the two; None: logits are compared for a
    classification, and any other task cannot be distilled."""
    is_classification: bool = False
    """Whether the first output is one row of logits per sample."""

    def read(self, batch: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Return the inputs of the graph and the target.

        Raises:
            DataError: `unpack` fails on the batch, or does not find tensors in it.
        """
        with _users_code(
            f"expected a batch that the task can unpack, found {_kind(batch)}",
            "give the Task an unpack function: batch -> (one tensor per input, target)",
        ):
            inputs, target = self.unpack(batch)
        if not isinstance(inputs, (tuple, list)) or not all(isinstance(t, Tensor) for t in inputs):
            raise DataError(
                f"expected the task to unpack a batch into (one tensor per input, target), found inputs {_kind(inputs)}"
            )
        return tuple(inputs), target

    def sample(self, data: DataSource) -> tuple[Tensor, ...]:
        """Return the inputs of one test sample, as a batch.

        Raises:
            DataError: There is none, or it cannot be read.
        """
        with _users_code(
            f"data {data.name!r}: the first test sample makes no batch",
            "mend the data set, or give the Task a collate function: samples -> batch",
        ):
            batch = next(iter(data.test(1, limit=1, collate=self.collate)), None)
        if batch is None:
            raise DataError(f"data {data.name!r}: the test set is empty")
        return self.read(batch)[0]

    def loss_of(self, program: Program, batch: Any, device: str) -> Tensor:
        """Return the mean loss of a training batch, on a device that the program is on.

        Raises:
            DataError: The samples do not fit the program.
        """
        inputs, target = self.read(batch)
        with told_by_shape(program, inputs):
            outputs = program.module(*(t.to(device) for t in inputs))
        if self.is_classification and (logits := flat_outputs(outputs)[0]).dim() == 2:
            must_be_labels(target, logits.shape[1], "training set")
        return self.loss(outputs, tree_map_only(Tensor, lambda t: t.to(device), target))


def classification() -> Task:
    """Return the default task: cross-entropy of the first output, top-1 accuracy."""
    return Task(
        loss=_cross_entropy, metric=_accuracy, metric_name="accuracy", is_classification=True
    )


def load_task(text: str) -> Task:
    """Return the task that ``package.module:factory`` makes; an empty text means classification.

    Raises:
        UsageError: The text has another form, or nothing of that name is there.
        DataError: The function returns something else than a task.
    """
    if not text:
        return classification()
    factory = find_callable("task", text, error=UsageError)
    task = factory()
    if not isinstance(task, Task):
        raise DataError(
            f"task {text!r}: expected it to return a graphprune.training.Task, "
            f"found {type(task).__name__}"
        )
    return task


@contextmanager
def _users_code(what: str, advice: str) -> Iterator[None]:
    """Say of what the user's own functions raise, which may be anything, where it was and what to do."""
    try:
        yield
    except GraphpruneError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}; {advice}") from error


def _kind(value: Any) -> str:
    """Return what a batch is, and what it holds."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(map(_kind, value))}"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _logits(outputs: Any, target: Any) -> Tensor:
    logits = flat_outputs(outputs)[0]
    is_integer = isinstance(target, Tensor) and not target.is_floating_point()
    if not is_integer or logits.dim() != 2 or target.shape != logits.shape[:1]:
        found = (
            f"{str(target.dtype).removeprefix('torch.')}{list(target.shape)}"
            if isinstance(target, Tensor)
            else type(target).__name__
        )
        raise DataError(
            "cross-entropy expected one row of logits and one integer label per sample, found outputs "
            f"{list(logits.shape)} and targets {found}; give another task, package.module:factory"
        )
    return logits


def _cross_entropy(outputs: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(_logits(outputs, target).float(), target)


def _accuracy(outputs: Any, target: Tensor) -> Tensor:
    return (_logits(outputs, target).argmax(1) == target).to(torch.float64).mean()
