"""What a program in training is worth: its loss and metric on the test set, and batch norms that fit its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from graphprune.data import TensorImages, innermost
from graphprune.errors import DataError
from graphprune.progress import Progress
from graphprune.training.placement import Placement
from graphprune.training.running_statistics import RunningStatistics

if TYPE_CHECKING:
    from collections.abc import Sized

    from accelerate import Accelerator

__all__ = ["evaluate", "put_in_evaluation", "settle_norms"]

BATCH = 256
"""Samples at a time."""


def put_in_evaluation(module: nn.Module) -> None:
    """Switch every module to evaluation, also those that refuse to be told."""
    for child in module.modules():
        child.training = False


@torch.no_grad()
def evaluate(
    placement: Placement,
    dataset: Dataset[Any],
    accelerator: Accelerator,
    *,
    progress: Progress,
    workers: int = 0,
) -> tuple[float, float]:
    """Return the loss and the metric of the program in its place, as means over all samples of all processes.

    Raises:
        DataError: There is no sample.
    """
    put_in_evaluation(placement.program.module)
    task = placement.task
    loader = _share(dataset, placement, accelerator, workers)
    sums = torch.zeros(3, dtype=torch.float64, device=placement.device)
    with progress.task("evaluate", len(loader)) as bar:
        for batch in loader:
            inputs, target = placement.place(batch, where="test set")
            with accelerator.autocast():
                outputs = placement.evaluate(inputs)
                loss = task.loss(outputs, target)
            metric = task.metric(outputs, target)
            ones = torch.ones((), dtype=torch.float64, device=placement.device)
            sums += len(inputs[0]) * torch.stack([loss.double(), metric.double(), ones])
            bar.advance()
    loss_sum, metric_sum, total = accelerator.reduce(sums, "sum").tolist()
    if not total:
        raise DataError("expected at least one test sample, found none")
    return loss_sum / total, metric_sum / total


def _share(
    dataset: Dataset[Any], placement: Placement, accelerator: Accelerator, workers: int
) -> DataLoader[Any]:
    """Return the batches that this process looks at."""
    count = len(cast("Sized", dataset))
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    is_whole = isinstance(innermost(dataset), TensorImages)
    return DataLoader(
        Subset(dataset, mine),
        placement.fixed_batch or BATCH,
        num_workers=workers,
        collate_fn=_as_is if is_whole else placement.task.collate,
    )


@torch.no_grad()
def settle_norms(
    placement: Placement, batches: Iterable[tuple[Any, ...]], accelerator: Accelerator
) -> None:
    """Give the batch norms of the program in its place the statistics that its weights have on `batches` of inputs."""
    put_in_evaluation(placement.program.module)
    statistics = RunningStatistics(
        placement.program.module, synchronised=accelerator.num_processes > 1
    )
    if not statistics.has_batch_norms:
        return
    for inputs in batches:
        with accelerator.autocast():
            statistics.look(*inputs)
    statistics.write()


def _as_is(batch: Any) -> Any:
    return batch
